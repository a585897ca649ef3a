"""Functional forms of differentiation: `grad`, `value_and_grad`, `vjp`. They nest to any order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jitgrad import autograd, ops
from jitgrad.errors import AutogradError, complain
from jitgrad.tensor import Tensor
from jitgrad.tree import flatten, map_tree, unflatten


class _Tracked:
    """Arguments with every differentiable leaf replaced by a stand-in that gradients can be asked for."""

    def __init__(self, tree: Any):
        self.fresh: list[Tensor] = []                 # leaves made here: nobody else can ask for their gradient
        self.tree = map_tree(self._track, tree)

    def _track(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dtype.is_differentiable:
            return leaf
        if leaf.requires_grad:                        # an outer differentiation must go on through it
            return ops.reshape(leaf, shape=leaf.shape)
        stand_in = leaf._alias()
        stand_in._requires_grad = True
        self.fresh.append(stand_in)
        return stand_in

    def gradients(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Any:
        """Gradients in the tree's shape: zeros where `outputs` do not depend on a leaf."""
        leaves: list[Any] = []
        structure = flatten(self.tree, leaves)
        wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        roots = [(t, g) for t, g in zip(outputs, gradients) if t.requires_grad]
        found: Sequence[Any] = [None] * len(wanted)
        if roots:
            found = autograd.grad([t for t, _ in roots], wanted, [g for _, g in roots], retain_graph=True,
                                  create_graph=True, allow_unused=True)
        by_id = {id(t): ops.zeros_like(t) if g is None else g for t, g in zip(wanted, found)}
        return unflatten(structure, [by_id.get(id(t)) for t in leaves])

    def released(self, leaf: Any) -> Any:
        """A result without its history, if all of that leads to stand-ins made here and nowhere else."""
        if not isinstance(leaf, Tensor) or not leaf.requires_grad:
            return leaf
        own = {id(t) for t in self.fresh}
        return leaf.detach() if all(id(t) in own for t in autograd.leaves_of(leaf)) else leaf


def value_and_grad(function: Callable[..., Any], argnums: int | tuple[int, ...] = 0,
                   has_aux: bool = False) -> Callable[..., Any]:
    """A function that returns (value, gradient); with `has_aux`, where `function` returns (value, aux), it returns
    ((value, aux), gradient).

    `function` must return one 0-d Tensor (and aux). The gradient has the structure of argument `argnums`; for a tuple
    of positions it is a tuple of them."""
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(function)
    def differentiated(*args: Any, **kwargs: Any) -> Any:
        with autograd.enable_grad():
            tracked = _Tracked(tuple(args[k] for k in positions))
            arguments = list(args)
            for k, replacement in zip(positions, tracked.tree):
                arguments[k] = replacement
            result = function(*arguments, **kwargs)
            value, aux = result if has_aux else (result, None)
            if not isinstance(value, Tensor) or value.shape != ():
                what = value.tensor_type if isinstance(value, Tensor) else type(value).__name__
                raise complain(AutogradError, "grad", f"the function must return a single number (a 0-d Tensor), "
                               f"not {what}", fix="Reduce it with sum() or mean()")
            gradients = tracked.gradients([value], [None])
        gradients, value, aux = map_tree(tracked.released, (gradients, value, aux))
        for stand_in in tracked.fresh:                # over: a history that leads here is one of constants
            stand_in._requires_grad = False
        if isinstance(argnums, int):
            gradients = gradients[0]
        return ((value, aux), gradients) if has_aux else (value, gradients)

    return differentiated


def grad(function: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable[..., Any]:
    """A function that returns the gradient of `function` in argument(s) `argnums`; with `has_aux` (gradient, aux)."""
    both = value_and_grad(function, argnums, has_aux)

    @functools.wraps(function)
    def differentiated(*args: Any, **kwargs: Any) -> Any:
        value, gradients = both(*args, **kwargs)
        return (gradients, value[1]) if has_aux else gradients

    return differentiated


def vjp(function: Callable[..., Any], *primals: Any, has_aux: bool = False) -> Any:
    """``(function(*primals), pull)``, where ``pull(*cotangents)`` gives the gradients in `primals` as a tuple; with
    `has_aux` (output, pull, aux)."""
    with autograd.enable_grad():
        tracked = _Tracked(primals)
        result = function(*tracked.tree)
    output, aux = result if has_aux else (result, None)
    outputs: list[Any] = []
    structure = flatten(output, outputs)

    def pull(cotangents: Any) -> Any:
        gradients: list[Any] = []
        if flatten(cotangents, gradients) != structure:
            raise complain(AutogradError, "vjp", "the cotangents do not have the structure of the function's output")
        with autograd.enable_grad():
            found = tracked.gradients(outputs, gradients)
        return map_tree(tracked.released, found)

    shown = map_tree(tracked.released, output)
    return (shown, pull, map_tree(tracked.released, aux)) if has_aux else (shown, pull)
