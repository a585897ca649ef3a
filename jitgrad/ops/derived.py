"""Derived operations that eager execution carries out in one step.

A derived operation is a function of primitives, and that function is what it means: while something is being traced,
in half precision, and under transforms it is simply called. Eager execution on float32 and float64 instead runs an
array function of the same operands, and leaves one node on the tape, with gradient rules of its own:

    @derived(lambda x, w, b: x @ w.T + b, vjp=(lambda g, w: ..., lambda g, x: ..., lambda g: ...))
    def linear(x, w, b): ...                       # positional parameters are operands, keyword-only ones attributes

Without rules it is for gradient rules to call: recorded for a gradient of higher order it is its definition again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jitgrad.dtypes import float32, float64
from jitgrad.ir.graph import GraphBuilder
from jitgrad.ir.interpreter import state
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType

__all__ = ["Derived", "derived"]


@dataclass(eq=False, slots=True)
class Derived(Op):
    """An op that graphs never hold: there it is its `definition`."""

    definition: Callable[..., Any] = lambda: None

    def __call__(self, *inputs: Any, **attrs: Any) -> Any:
        carries_out = getattr(state.current, "carries_out", None)
        if carries_out is not None and inputs[0].dtype in _WIDE and carries_out(self, inputs):
            return state.current.run(self, inputs, attrs)  # type: ignore[union-attr]
        return self.definition(*inputs, **attrs)


_WIDE = (float32, float64)


def derived(eager: Callable[..., Any], vjp: tuple[Callable[..., Any] | None, ...] | None = None) -> Callable[..., Op]:
    """Decorates a function of primitives: `eager` is what it computes, on arrays that are given in float32 or float64;
    `vjp` the gradient rules (see `jitgrad.ir.op`)."""

    def decorate(definition: Callable[..., Any]) -> Op:
        name = definition.__name__.strip("_")
        parameters = inspect.signature(definition).parameters.values()
        operands = tuple([p.name for p in parameters if p.kind is not p.KEYWORD_ONLY])

        def infer(*types: TensorType, **attrs: Any) -> TensorType:
            builder = GraphBuilder(name)
            with builder:
                return definition(*[builder.input(t) for t in types], **attrs).type  # type: ignore[no-any-return]

        return Derived(name, operands, infer, eager, "region", vjp=vjp, doc=definition.__doc__ or "",
                       definition=definition)

    return decorate
