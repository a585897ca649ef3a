"""`Optimizer`: param groups, the state of each parameter, and the step that subclasses fill in.

A subclass defines the options' defaults, and `_update(group, params)` for those parameters of one group that have a
gradient: a plain formula of one element, which `update` carries out over all of them as one node. The state dict has
PyTorch's format: state by the position of the parameter, groups with positions instead of Parameters.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache, partial
from typing import Any

import numpy as np

from jitgrad import changes, dtypes
from jitgrad.autograd import eager_state, enable_grad, no_grad, number
from jitgrad.functional.foreach import foreach_
from jitgrad.hooks import Hook, HookTable, RemovableHandle
from jitgrad.optim.groups import ParamGroup, WatchedList
from jitgrad.tensor import Tensor, tensor_on

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class Optimizer:
    """Base of all optimizers: ``Optimizer(params, defaults)``.

    `params` are Tensors, (name, Tensor) pairs, or dicts with "params" and options of their own."""

    param_groups: list[ParamGroup]
    state: defaultdict[Tensor, dict[str, Any]]

    def __init__(self, params: Params, defaults: dict[str, Any]):
        if isinstance(params, Tensor):
            raise TypeError(f"{type(self).__name__}: params is a single Tensor; give an iterable: [tensor]")
        self.defaults = defaults
        self.state = defaultdict(dict)
        self.param_groups = WatchedList()
        self._pre_hooks, self._post_hooks = HookTable(), HookTable()
        given = list(params)
        if not given:
            raise ValueError(f"{type(self).__name__}: got an empty list of parameters")
        groups: list[Any] = given if isinstance(given[0], Mapping) else [{"params": given}]
        for group in groups:
            self.add_param_group(group)

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters with options of their own; what is not given has the optimizer's defaults."""
        if not isinstance(group, Mapping):
            raise TypeError(f"{type(self).__name__}: a param group is a dict, not a {type(group).__name__}")
        given = group["params"]
        if isinstance(given, (set, frozenset)):
            raise TypeError(f"{type(self).__name__}: parameters must be in an order; a set has none. Use a list")
        members: list[Any] = [given] if isinstance(given, Tensor) else list(given)
        complete = ParamGroup()
        complete.update({**self.defaults, **group, "params": members})
        if members and isinstance(members[0], tuple):
            complete.update(param_names=[name for name, _ in members], params=[param for _, param in members])
        self._check_members(complete)
        self.param_groups.append(complete)

    def _check_members(self, group: ParamGroup) -> None:
        name = type(self).__name__
        known = {id(param) for other in self.param_groups for param in other["params"]}
        for k, param in enumerate(group["params"]):
            if not isinstance(param, Tensor):
                raise TypeError(f"{name}: params[{k}] is a {type(param).__name__}, not a Tensor")
            if not param.is_leaf:
                raise ValueError(f"{name}: params[{k}] is the result of an op; only leaf Tensors can be optimized")
            if id(param) in known:
                raise ValueError(f"{name}: params[{k}] appears in more than one place of the param groups")
            known.add(id(param))
        for option, value in self.defaults.items():
            if value is REQUIRED and group[option] is REQUIRED:
                raise ValueError(f"{name}: the param group gives no {option!r}, which has no default")

    # --- stepping -------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient. With a `closure`, call it first (it computes gradients) and
        return what it returns."""
        for hook in self._pre_hooks:
            hook.function(self, (closure,), {})
        loss = None
        if closure is not None:
            with enable_grad():
                loss = closure()
        with no_grad():
            for group in self.param_groups:
                params = [param for param in group["params"] if param.grad is not None]
                if params:
                    self._update(group, params)
        for hook in self._post_hooks:
            hook.function(self, (closure,), {})
        return loss

    def _update(self, group: ParamGroup, params: list[Tensor]) -> None:
        """One update of `params`, which all have a gradient."""
        raise NotImplementedError(f"{type(self).__name__}: define _update(group, params)")

    @property
    def can_be_skipped(self) -> bool:
        """Whether a step consists of nothing but `update`, so that it may be carried out under `kept_if`. A subclass from
        elsewhere may do other things."""
        ours = type(self)._update.__module__.startswith("jitgrad.optim") and type(self).step is Optimizer.step
        return ours and not len(self._pre_hooks) and not len(self._post_hooks)

    def _states(self, params: list[Tensor], name: str, make: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The state `name` of each parameter, made by ``make(param)`` where there is none. It is made eagerly also
        while a function is being compiled, so that the first step has the same graph as all others."""
        for param in params:
            if name not in self.state[param]:
                self.state[param][name] = eager_state(partial(make, param))
        return [self.state[param][name] for param in params]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or fill them with zeros in place."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if set_to_none:
                    param.grad = None
                else:
                    with no_grad():
                        param.grad.detach().zero_()

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """``hook(optimizer, args, kwargs)`` before each step."""
        return self._pre_hooks.add(Hook(hook))

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """``hook(optimizer, args, kwargs)`` after each step."""
        return self._post_hooks.add(Hook(hook))

    # --- saving ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State and options as plain dicts, with positions in place of Parameters."""
        members = [param for group in self.param_groups for param in group["params"]]
        position = {id(param): k for k, param in enumerate(members)}
        groups = [{**{k: v for k, v in group.items() if k != "params"},
                   "params": [position[id(param)] for param in group["params"]]} for group in self.param_groups]
        state = {position[id(param)]: dict(entry) for param, entry in self.state.items() if id(param) in position}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over state and options; the groups must have as many parameters as here."""
        saved = state_dict["param_groups"]
        sizes, here = [len(g["params"]) for g in saved], [len(g["params"]) for g in self.param_groups]
        if sizes != here:
            raise ValueError(f"{type(self).__name__}: the state dict has groups of {sizes} parameters, the optimizer "
                             f"of {here}")
        members = [param for group in self.param_groups for param in group["params"]]
        positions = [position for group in saved for position in group["params"]]
        at = dict(zip(positions, members))
        state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        for position, entry in state_dict["state"].items():
            if int(position) in at:
                state[at[int(position)]] = _adopt(entry, at[int(position)])
        for group, options in zip(self.param_groups, saved):
            group.update({k: deepcopy(v) for k, v in options.items() if k != "params"})
        self.state = state
        changes.bump()

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for k, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {k}")
            lines += [f"    {name}: {value}" for name, value in sorted(group.items()) if name != "params"]
        return "\n".join([*lines, ")"])


class _Required:
    """The default of an option that has none."""

    def __repr__(self) -> str:
        return "<required>"


REQUIRED: Any = _Required()
SCALARS = ("step", "mu_product", "eta", "mu")
"""States that are one number for a parameter, in float32 whatever its dtype is."""


def scalar_state(value: float = 0.0) -> Callable[[Tensor], Tensor]:
    """Maker of a 0-d float32 state, such as the number of steps; it is where the parameter is, so that a GPU counts."""
    return lambda param: tensor_on(np.array(value, dtypes.float32.numpy), param.device)


def filled_state(value: float = 0.0) -> Callable[[Tensor], Tensor]:
    """Maker of a state of the parameter's shape and dtype. Zeros are written, too: a step that is the first to read its
    pages, and then writes them, has the system make each of them twice."""
    return lambda param: tensor_on(np.full(param.shape, value, param.dtype.numpy), param.device)


def option(group: ParamGroup, *keys: Any) -> Any:
    """A number of `group`, traced while a function is being compiled; arithmetic on it is in float64."""
    value: Any = group
    for key in keys:
        value = value[key]
    return value if isinstance(value, Tensor) else number(group, *keys)


def sign(group: ParamGroup) -> float:
    """By what gradients are multiplied: -1 to maximize."""
    return -1.0 if group["maximize"] else 1.0


def gradients(params: list[Tensor]) -> list[Tensor]:
    """The gradients, in the parameters' dtype."""
    pairs = [(param.grad, param.dtype) for param in params if param.grad is not None]
    return [grad if grad.dtype is dtype else grad.to(dtype) for grad, dtype in pairs]


def update(formula: Callable[..., Any], shared: Sequence[Any], written: list[list[Tensor]],
           read: Sequence[list[Tensor]] = ()) -> None:
    """``formula(*shared, *written, *read)`` of every parameter gives the new values of `written`, stored in place."""
    if _skipping.condition is None:
        foreach_(formula, shared, written, read)
    else:
        foreach_(_keeping(formula, len(shared)), [_skipping.condition, *shared], written, read)


class _Skipping(threading.local):
    """What decides whether updates happen; None: they do."""

    condition: Tensor | None = None


_skipping = _Skipping()


@contextmanager
def kept_if(condition: Tensor) -> Iterator[None]:
    """Inside, `update` keeps the old values if `condition` (0-d) is above 0, without anybody reading it."""
    outer, _skipping.condition = _skipping.condition, condition
    try:
        yield
    finally:
        _skipping.condition = outer


@lru_cache(maxsize=256)
def _keeping(formula: Callable[..., Any], shared: int) -> Callable[..., tuple[Any, ...]]:
    """`formula` with one more number in front: if it is above 0, old values are the new ones."""

    def update(condition: Any, *operands: Any) -> tuple[Any, ...]:
        new = formula(*operands)
        results = new if isinstance(new, tuple) else (new,)
        return tuple([(condition > 0).where(old, value) for old, value in zip(operands[shared:], results)])

    update.__name__ = formula.__name__
    return update


def advance(step: Any) -> Any:
    """Count one step."""
    return step + 1


def check_not_negative(optimizer: str, **options: Any) -> None:
    """ValueError that names the first option below zero (or NaN)."""
    for name, value in options.items():
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{optimizer}: {name} must not be negative, got {value}")


def check_ways(optimizer: str, ways: Mapping[str, bool | None]) -> None:
    """PyTorch's options of how a step is carried out. `foreach`, `fused` and `capturable` need not be chosen: there is one
    way, over all parameters at once, which may be compiled. A step has no gradient, so `differentiable` is refused."""
    for name, value in ways.items():
        if name not in ("foreach", "fused", "capturable", "differentiable"):
            raise TypeError(f"{optimizer}: there is no option {name!r}")
        if name == "differentiable" and value:
            raise ValueError(f"{optimizer}: differentiable=True is not supported: a step is made in place, without history")


def check_betas(optimizer: str, betas: tuple[float, float]) -> None:
    """ValueError unless both lie in [0, 1)."""
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{optimizer}: betas must lie in [0, 1), got {betas}")


def _adopt(entry: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """Copies of saved state: floats in the parameter's dtype, except `SCALARS`."""
    adopted: dict[str, Any] = {}
    for name, value in entry.items():
        if not hasattr(value, "shape"):
            adopted[name] = deepcopy(value)
            continue
        tensor = value.detach().clone() if isinstance(value, Tensor) else Tensor(np.asarray(value).copy())
        floats = tensor.dtype.is_floating_point and param.dtype.is_floating_point
        adopted[name] = tensor.to(param.device, param.dtype if floats and name not in SCALARS else tensor.dtype)
    return adopted
