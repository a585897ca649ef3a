"""Gradient checkpointing (Chen et al. 2016, "Training deep nets with sublinear memory cost").

In goes a function of Tensors; out comes its result, with a history that keeps the function's inputs and nothing of what
lies between. The walk back runs the function again, with the same random numbers, when its values are needed. Inside of
a compiled step the second run becomes part of the plan, kept apart from the first one.

    for block in self.blocks:
        x = checkpoint(block, x)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from jitgrad import autograd
from jitgrad.errors import CheckpointError, complain
from jitgrad.functional import autocast
from jitgrad.functional.random import default_generator
from jitgrad.ir import interpreter
from jitgrad.tensor import Tensor
from jitgrad.tree import flatten, unflatten

__all__ = ["CheckpointError", "checkpoint", "checkpoint_sequential", "noop_context_fn", "set_checkpoint_early_stop"]

CHECKS = ("default", "none")
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


class _Setting(threading.local):
    early_stop = True


_setting = _Setting()


def noop_context_fn() -> Contexts:
    """Two contexts that do nothing: of the first run, and of the second."""
    return nullcontext(), nullcontext()


@contextmanager
def set_checkpoint_early_stop(enable: bool) -> Iterator[None]:
    """For the checkpoints made inside: whether a second run ends as soon as all that gradients need is there (as it
    does by default)."""
    outer, _setting.early_stop = _setting.early_stop, bool(enable)
    try:
        yield
    finally:
        _setting.early_stop = outer


def checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool | None = False,
               preserve_rng_state: bool = True, context_fn: Callable[[], Contexts] = noop_context_fn,
               determinism_check: str = "default", debug: bool = False, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, of which the tape keeps only the Tensors in `args` and `kwargs`; everything else that
    gradients need is computed again in the backward pass.

    function             anything that can be called; it runs twice, so what it does besides (counting batches) is done
                         twice. It may be nested, return anything, and use Tensors from outside: they get gradients
    use_reentrant        accepted; there is one way of doing it, that of PyTorch's ``use_reentrant=False``
    preserve_rng_state   the second run draws the random numbers of the first
    context_fn           gives two contexts, which the runs are in
    determinism_check    "default": types of what the two runs compute are compared; "none": they are not
    debug                an error of that comparison names the line

    CheckpointError, when gradients are computed, if the second run does other things than the first, or if an input was
    changed in place in between."""
    if not callable(function):
        raise complain(CheckpointError, "checkpoint", f"needs a function, got {type(function).__name__}")
    if determinism_check not in CHECKS:
        raise complain(CheckpointError, "checkpoint", f"determinism_check={determinism_check!r}; it is one of "
                       f"{', '.join(map(repr, CHECKS))}")
    first, second = context_fn()
    if not autograd.is_grad_enabled():
        with first:
            return function(*args, **kwargs)
    leaves: list[Any] = []
    structure = flatten((args, kwargs), leaves)
    places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    state = default_generator.get_state() if preserve_rng_state else None
    precision = autocast.state.setting

    def run(tensors: Sequence[Any]) -> None:
        given = list(rest)
        for k, t in zip(places, tensors, strict=True):
            given[k] = t
        positional, named = unflatten(structure, given)
        function(*positional, **named)

    frame = autograd.Frame(run, tuple([leaves[k] for k in places]), lambda: _second_context(second, state, precision),
                           determinism_check == "default", debug, _setting.early_stop)
    rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    repeatable = preserve_rng_state and context_fn is noop_context_fn
    with first, interpreter.state.current.block(repeatable), frame.first_run():  # type: ignore[union-attr]
        return function(*args, **kwargs)


@contextmanager
def _second_context(context: AbstractContextManager[Any], state: Any, precision: autocast.Setting) -> Iterator[None]:
    """The user's context, the random numbers and the mixed precision of the first run."""
    now = default_generator.get_state()
    try:
        if state is not None:
            default_generator.set_state(state)
        with autocast.region(precision), context:
            yield
    finally:
        if state is not None:
            default_generator.set_state(now)


def checkpoint_sequential(functions: Any, segments: int, input: Any, use_reentrant: bool | None = False,
                          preserve_rng_state: bool = True) -> Any:
    """`functions` (a Sequential, or a sequence of functions) one after the other on `input`, in `segments` of equal
    length; all segments but the last are checkpointed."""
    steps = list(functions.children()) if hasattr(functions, "children") else list(functions)
    if not isinstance(segments, int) or not 1 <= segments <= max(1, len(steps)):
        raise complain(CheckpointError, "checkpoint_sequential", f"{segments} segments of {len(steps)} functions",
                       fix=f"Pass a number from 1 to {max(1, len(steps))}")
    length = max(1, len(steps) // segments)
    for k in range(segments - 1):
        part = steps[k * length:(k + 1) * length]
        input = checkpoint(_chain(part), input, use_reentrant=use_reentrant, preserve_rng_state=preserve_rng_state)
    return _chain(steps[(segments - 1) * length:])(input)


def _chain(functions: Sequence[Callable[..., Any]]) -> Callable[[Any], Any]:
    """The functions one after the other."""

    def run(input: Any) -> Any:
        for function in functions:
            input = function(input)
        return input

    return run
