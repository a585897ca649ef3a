"""Derived operations that eager execution carries out in one step.

A derived operation is a function of primitives, and that function is what it means: while something is being traced,
in half precision, and under transforms it is simply called. Eager execution on float32 and float64 instead runs an
array function of the same operands, and leaves one node on the tape, with gradient rules of its own:

    @derived(lambda x, w, b: x @ w.T + b, vjp=(lambda g, w: ..., lambda g, x: ..., lambda g: ...))
    def linear(x, w, b): ...                       # positional parameters are operands, keyword-only ones attributes

Elementwise functions of one tensor need not be written twice: `pointwise` carries out their graph block by block.
Without rules an operation is for gradient rules to call: recorded for a gradient of higher order it is its definition again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.dtypes import DType, float32, float64, from_numpy
from jitgrad.ir.graph import Graph, GraphBuilder
from jitgrad.ir.interpreter import state
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType
from jitgrad.ops.foreach import body_gradient

__all__ = ["Derived", "derived", "pointwise"]


@dataclass(eq=False, slots=True)
class Derived(Op):
    """An op that graphs never hold: there it is its `definition`."""

    definition: Callable[..., Any] = lambda: None

    def __call__(self, *inputs: Any, **attrs: Any) -> Any:
        if self.in_one_step(*inputs):
            return state.current.run(self, inputs, attrs)  # type: ignore[union-attr]
        return self.definition(*inputs, **attrs)

    def in_one_step(self, *inputs: Any) -> bool:
        """Whether it is now carried out in one step on these operands, rather than by its definition."""
        carries_out = getattr(state.current, "carries_out", None)
        return carries_out is not None and inputs[0].dtype in _WIDE and carries_out(self, inputs)


_WIDE = (float32, float64)


def derived(eager: Callable[..., Any], vjp: tuple[Callable[..., Any] | None, ...] | None = None, *,
            view: bool = False) -> Callable[..., Derived]:
    """Decorates a function of primitives: `eager` is what it computes, on arrays that are given in float32 or float64;
    `vjp` the gradient rules (see `jitgrad.ir.op`)."""

    def decorate(definition: Callable[..., Any]) -> Derived:
        name = definition.__name__.strip("_")
        parameters = inspect.signature(definition).parameters.values()
        operands = tuple([p.name for p in parameters if p.kind is not p.KEYWORD_ONLY])

        def infer(*types: TensorType, **attrs: Any) -> TensorType:
            builder = GraphBuilder(name)
            with builder:
                return definition(*[builder.input(t) for t in types], **attrs).type  # type: ignore[no-any-return]

        return Derived(name, operands, infer, eager, "region", vjp=vjp, view=view,
                       doc=definition.__doc__ or "", definition=definition)

    return decorate


def pointwise(definition: Callable[..., Any]) -> Op:
    """Decorates an elementwise function of one tensor (and keyword-only attributes): it and its gradient are each one
    `foreach`."""
    names = [p.name for p in inspect.signature(definition).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def eager(x: np.ndarray, **attrs: Any) -> np.ndarray:
        body, _ = _bodies(definition, from_numpy(x.dtype), tuple(attrs.items()))
        return ops.foreach.eager(x, body=body, groups=1, shared=0)[0]  # type: ignore[no-any-return]

    def gradient(g: Any, x: Any, *attrs: Any) -> Any:
        _, body = _bodies(definition, x.dtype, tuple(zip(names, attrs)))
        return ops.foreach(x, g, body=body, groups=1, shared=0)[0]

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("g", "x", *names)]
    gradient.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return derived(eager, vjp=(gradient,))(definition)


@lru_cache(maxsize=256)
def _bodies(definition: Callable[..., Any], dtype: DType, attrs: tuple[tuple[str, Any], ...]) -> tuple[Graph, Graph]:
    """The function of one element, and its gradient: (x, g) -> g * f'(x)."""
    builder = GraphBuilder(definition.__name__)
    with builder:
        result = definition(builder.input(TensorType(dtype, ())), **dict(attrs))
    body = builder.build([result])
    return body, body_gradient(body)
