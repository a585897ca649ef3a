"""What ``module(...)`` does when the Module has any hook.

`call_with_hooks` runs forward-pre hooks, forward and forward hooks, and puts identity functions around inputs and
outputs, through which backward hooks see the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jitgrad import tree
from jitgrad.autograd import Function
from jitgrad.hooks import Hook
from jitgrad.tensor import Tensor

if TYPE_CHECKING:
    from jitgrad.nn.module import Module

def call_with_hooks(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``module.forward(*args, **kwargs)`` with all hooks of `module` around it.

    A forward hook registered with ``always_call`` runs with the output None when forward raises."""
    pending = list(module._forward_hooks)
    try:
        args, kwargs = _run_forward_pre_hooks(module, args, kwargs)
        gradients = _BackwardHooks(module) if module._backward_hooks or module._backward_pre_hooks else None
        if gradients:
            args = gradients.wrap_inputs(args)
        result = module.forward(*args, **kwargs)
        while pending:
            result = _run_forward_hook(module, pending.pop(0), args, kwargs, result)
        return gradients.wrap_outputs(result) if gradients else result
    except Exception:
        for hook in pending:
            if hook.always_call:
                _run_forward_hook(module, hook, args, kwargs, None)
        raise


def _run_forward_pre_hooks(module: Module, args: tuple[Any, ...],
                           kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for hook in module._forward_pre_hooks:
        if not hook.with_kwargs:
            changed = hook.function(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
            continue
        changed = hook.function(module, args, kwargs)
        if changed is None:
            continue
        if not (isinstance(changed, tuple) and len(changed) == 2):
            raise RuntimeError(f"forward pre-hook: it must return None or (args, kwargs), got {changed!r}")
        args, kwargs = changed
    return args, kwargs


def _run_forward_hook(module: Module, hook: Hook, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    call = (module, args, kwargs, result) if hook.with_kwargs else (module, args, result)
    changed = hook.function(*call)
    return result if changed is None else changed


class _BackwardHooks:
    """The backward hooks of one forward call.

    Outputs and inputs that need gradients pass through identities. The backward of the outputs' identity runs first
    and notes ``grad_output``; that of the inputs' identity runs last and gives the hooks both."""

    def __init__(self, module: Module):
        self.module = module
        self.grad_output: tuple[Tensor | None, ...] = ()
        self.input_count = 0                          # Tensors or not: hooks see one entry per positional argument
        self.input_places: list[int] = []
        self.output_places: list[int] = []
        self.output_count = 0

    def wrap_inputs(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.input_count = len(args)
        self.input_places = [k for k, x in enumerate(args) if isinstance(x, Tensor) and x.requires_grad]
        return _through_identity(args, self.input_places, self._leave)

    def wrap_outputs(self, result: Any) -> Any:
        leaves: list[Any] = []
        structure = tree.flatten(result, leaves)
        self.output_count = len(leaves)
        self.output_places = [k for k, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        return tree.unflatten(structure, list(_through_identity(tuple(leaves), self.output_places, self._enter)))

    def _enter(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        current = _spread(gradients, self.output_places, self.output_count)
        for hook in self.module._backward_pre_hooks:
            changed = hook.function(self.module, current)
            if changed is not None:
                current = changed if isinstance(changed, tuple) else (changed,)
        self.grad_output = current
        if not self.input_places:                     # nothing below asks for gradients: this is the end
            self._run((None,) * self.input_count)
        return tuple(current[k] for k in self.output_places)

    def _leave(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        current = self._run(_spread(gradients, self.input_places, self.input_count))
        return tuple(current[k] for k in self.input_places)

    def _run(self, grad_input: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        for hook in self.module._backward_hooks:
            changed = hook.function(self.module, grad_input, self.grad_output)
            if changed is not None:
                grad_input = changed if isinstance(changed, tuple) else (changed,)
        return grad_input


def _spread(values: tuple[Any, ...], places: list[int], count: int) -> tuple[Any, ...]:
    """`values` at their places among `count` entries, None elsewhere."""
    at = dict(zip(places, values))
    return tuple(at.get(k) for k in range(count))


def _through_identity(values: tuple[Any, ...], places: list[int], backward: Callable[..., Any]) -> tuple[Any, ...]:
    if not places:
        return values
    passed = _Identity.apply(backward, *(values[k] for k in places))
    at = dict(zip(places, passed if isinstance(passed, tuple) else (passed,)))
    return tuple(at.get(k, value) for k, value in enumerate(values))


class _Identity(Function):
    """Tensors unchanged; their gradients as ``backward(gradients)`` returns them."""

    @staticmethod
    def forward(ctx: Any, backward: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.user_backward = backward
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return None, *ctx.user_backward(gradients)
