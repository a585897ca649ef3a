"""`Module`: a tree of parameters, buffers and submodules with a ``forward``.

Assigning an attribute files it where it belongs: a Parameter among the parameters, a Module among the submodules, a
Tensor under a buffer's name among the buffers, anything else in the instance as usual. Names, order, errors and the
format of ``state_dict`` are PyTorch's. Every change of attributes, structure or mode goes through `changes.bump`,
except assigning the object that is there already.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from jitgrad import changes, dtypes
from jitgrad.autograd import no_grad
from jitgrad.dtypes import DType
from jitgrad.hooks import Hook, HookTable, RemovableHandle
from jitgrad.nn import state
from jitgrad.nn.calling import call_with_hooks
from jitgrad.nn.parameter import Parameter
from jitgrad.tensor import Tensor

Self = TypeVar("Self", bound="Module")
_MISSING = object()
_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks",
                "_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


class Module:
    """Base of all layers and models: subclass it, call ``super().__init__()`` first, define ``forward``."""

    training: bool
    _parameters: dict[str, Parameter | None]
    _buffers: dict[str, Tensor | None]
    _modules: dict[str, Module | None]
    _non_persistent: set[str]
    _forward_pre_hooks: HookTable
    _forward_hooks: HookTable
    _backward_pre_hooks: HookTable
    _backward_hooks: HookTable
    _state_dict_hooks: HookTable
    _load_state_dict_pre_hooks: HookTable
    _load_state_dict_post_hooks: HookTable

    def __init__(self) -> None:
        fields = self.__dict__
        fields.update(training=True, _parameters={}, _buffers={}, _modules={}, _non_persistent=set())
        fields.update((name, HookTable()) for name in _HOOK_TABLES)

    # --- calling --------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__}: define forward(self, ...) in this subclass of Module")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fields = self.__dict__
        if (fields["_forward_pre_hooks"].entries or fields["_forward_hooks"].entries
                or fields["_backward_hooks"].entries or fields["_backward_pre_hooks"].entries):
            return call_with_hooks(self, args, kwargs)
        return self.forward(*args, **kwargs)

    # --- attributes -----------------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        fields = self.__dict__
        if "_modules" not in fields:
            if isinstance(value, (Parameter, Module)):
                raise AttributeError(f"{type(self).__name__}: call super().__init__() before assigning {name!r}")
            object.__setattr__(self, name, value)
            return
        if self._current(name) is value:
            return
        target = self._table_for(name, value)
        if target is None:
            object.__setattr__(self, name, value)
        else:
            self._file(target, name, value)
        changes.bump()

    def _current(self, name: str) -> Any:
        """What the attribute holds now in this instance, or a marker."""
        fields = self.__dict__
        for table in (fields["_parameters"], fields["_buffers"], fields["_modules"], fields):
            if name in table:
                return table[name]
        return _MISSING

    def _table_for(self, name: str, value: Any) -> dict[str, Any] | None:
        """The table in which `value` is filed under `name`; None: an ordinary attribute."""
        fields = self.__dict__
        if isinstance(value, Parameter):
            return fields["_parameters"]
        if isinstance(value, Module):
            return fields["_modules"]
        for table, kind in (("_parameters", "Parameter"), ("_buffers", "Tensor"), ("_modules", "Module")):
            if name not in fields[table]:
                continue
            if value is not None and not (kind == "Tensor" and isinstance(value, Tensor)):
                raise TypeError(f"{type(self).__name__}: {name!r} is a {table[1:-1]}; only a {kind} or None can be "
                                f"assigned to it, not a {type(value).__name__}. Delete it first with del")
            return fields[table]
        return None

    def _file(self, table: dict[str, Any], name: str, value: Any) -> None:
        """Enter `value`, and take the name out of every other table."""
        fields = self.__dict__
        for other in (fields, fields["_parameters"], fields["_buffers"], fields["_modules"]):
            if other is not table:
                other.pop(name, None)
        if table is not fields["_buffers"]:
            fields["_non_persistent"].discard(name)
        table[name] = value

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__
        if "_modules" in fields:
            for table in (fields["_parameters"], fields["_modules"], fields["_buffers"]):
                if name in table:
                    return table[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __delattr__(self, name: str) -> None:
        for table in (self._parameters, self._buffers, self._modules):
            if name in table:
                del table[name]
                self._non_persistent.discard(name)
                break
        else:
            object.__delattr__(self, name)
        changes.bump()

    def __dir__(self) -> list[str]:
        names = {*object.__dir__(self), *self._parameters, *self._buffers, *self._modules}
        return sorted(name for name in names if not name[:1].isdigit())

    # --- registration ---------------------------------------------------------------------------------------------

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Add a parameter; None reserves the name (``state_dict`` leaves it out)."""
        self._check_new_name(name, self._parameters)
        if param is not None and not isinstance(param, Parameter):
            raise TypeError(f"register_parameter: {name!r} is a {type(param).__name__}; wrap it: Parameter(tensor)")
        if param is not None and param.grad_fn is not None:
            raise ValueError(f"register_parameter: {name!r} is the result of an op; a parameter must be a leaf. "
                             f"Compute it in forward instead")
        self._file(self._parameters, name, param)
        changes.bump()

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Add a Tensor that moves and is saved with the module but is not learned; not saved if not `persistent`."""
        self._check_new_name(name, self._buffers)
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"register_buffer: {name!r} is a {type(tensor).__name__}, not a Tensor")
        self._file(self._buffers, name, tensor)
        (self._non_persistent.discard if persistent else self._non_persistent.add)(name)
        changes.bump()

    def register_module(self, name: str, module: Module | None) -> None:
        """Add a submodule under a name that may be computed."""
        self._check_new_name(name, self._modules)
        if module is not None and not isinstance(module, Module):
            raise TypeError(f"add_module: {name!r} is a {type(module).__name__}, not a Module")
        self._file(self._modules, name, module)
        changes.bump()

    add_module = register_module

    def _check_new_name(self, name: str, table: dict[str, Any]) -> None:
        if "_modules" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__}: call super().__init__() before registering {name!r}")
        if not isinstance(name, str):
            raise TypeError(f"{type(self).__name__}: the name must be a string, got {type(name).__name__}")
        if not name or "." in name:
            raise KeyError(f"{type(self).__name__}: the name {name!r} must not be empty and must not contain '.'")
        if name not in table and hasattr(self, name):
            raise KeyError(f"{type(self).__name__}: attribute {name!r} already exists")

    # --- walking the tree -----------------------------------------------------------------------------------------

    def named_modules(self, memo: set[Module] | None = None, prefix: str = "",
                      remove_duplicate: bool = True) -> Iterator[tuple[str, Module]]:
        """This module and all below it with dotted names; a shared one only at its first place."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, module in self._modules.items():
            if module is not None:
                below = prefix + ("." if prefix else "") + name
                yield from module.named_modules(memo, below, remove_duplicate)

    def modules(self) -> Iterator[Module]:
        return (module for _, module in self.named_modules())

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The direct submodules, each once."""
        seen: set[Module] = set()
        for name, module in self._modules.items():
            if module is not None and module not in seen:
                seen.add(module)
                yield name, module

    def children(self) -> Iterator[Module]:
        return (module for _, module in self.named_children())

    def _named_members(self, table: str, prefix: str, recurse: bool,
                       remove_duplicate: bool) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        places = self.named_modules(None, prefix, remove_duplicate) if recurse else [(prefix, self)]
        for path, module in places:
            for name, member in module.__dict__[table].items():
                if member is None or id(member) in seen:
                    continue
                if remove_duplicate:
                    seen.add(id(member))
                yield path + ("." if path else "") + name, member

    def named_parameters(self, prefix: str = "", recurse: bool = True,
                         remove_duplicate: bool = True) -> Iterator[tuple[str, Parameter]]:
        """All parameters with dotted names, in order of registration; a shared one only once."""
        return self._named_members("_parameters", prefix, recurse, remove_duplicate)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        return (param for _, param in self.named_parameters(recurse=recurse))

    def named_buffers(self, prefix: str = "", recurse: bool = True,
                      remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        """All buffers with dotted names; a shared one only once."""
        return self._named_members("_buffers", prefix, recurse, remove_duplicate)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        return (buffer for _, buffer in self.named_buffers(recurse=recurse))

    def get_submodule(self, target: str) -> Module:
        """The module at a dotted path; the empty path is this module."""
        module: Any = self
        for step in target.split(".") if target else ():
            found = module._modules.get(step)
            if found is None:
                raise AttributeError(f"{type(module).__name__} has no submodule {step!r} (of the path {target!r})")
            module = found
        return module

    def get_parameter(self, target: str) -> Parameter:
        """The parameter at a dotted path."""
        return self._member("_parameters", "parameter", target)

    def get_buffer(self, target: str) -> Tensor:
        """The buffer at a dotted path."""
        return self._member("_buffers", "buffer", target)

    def _member(self, table: str, what: str, target: str) -> Any:
        path, _, name = target.rpartition(".")
        module = self.get_submodule(path)
        found = module.__dict__[table].get(name)
        if found is None:
            raise AttributeError(f"{type(module).__name__} has no {what} {name!r} (of the path {target!r})")
        return found

    # --- mode, gradients ------------------------------------------------------------------------------------------

    def train(self: Self, mode: bool = True) -> Self:
        """Set training mode (dropout, batch statistics …) here and below."""
        if not isinstance(mode, bool):
            raise ValueError(f"train: the mode is True or False, got {mode!r}")
        self.training = mode
        for module in self.children():
            module.train(mode)
        return self

    def eval(self: Self) -> Self:
        """Set evaluation mode here and below."""
        return self.train(False)

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """Learn the parameters, or freeze them."""
        for param in self.parameters():
            param.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters, or fill them with zeros in place."""
        for param in self.parameters():
            if param.grad is None:
                continue
            if set_to_none:
                param.grad = None
            else:
                with no_grad():
                    param.grad.detach().zero_()

    # --- conversion -----------------------------------------------------------------------------------------------

    def apply(self: Self, fn: Callable[[Module], Any]) -> Self:
        """Call ``fn(module)`` on everything below, then on this module."""
        for module in self.children():
            module.apply(fn)
        fn(self)
        return self

    def _apply(self: Self, convert: Callable[[Tensor], Tensor]) -> Self:
        """Replace the data of all parameters, their gradients and all buffers; a Parameter stays the same object."""
        with no_grad():
            for param in self.parameters():
                param.data = convert(param.data)
                if param.grad is not None:
                    param.grad = convert(param.grad)
            replaced: dict[int, Tensor] = {}
            for module in self.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = replaced.setdefault(id(buffer), convert(buffer))
        changes.bump()
        return self

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """``to(dtype)``, ``to(device)``, ``to(device, dtype)`` or ``to(tensor)``; a dtype converts only floats."""
        device, dtype, non_blocking = _read_destination(args, kwargs)
        if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
            raise TypeError(f"to: a Module converts to floating-point or complex types only, got {dtype}")

        def convert(x: Tensor) -> Tensor:
            converted = dtype is not None and x.dtype.is_floating_point
            return x.to(x.device if device is None else device, dtype if converted else x.dtype, non_blocking=non_blocking)

        return self._apply(convert)

    def type(self: Self, dst_type: DType) -> Self:
        """Convert all parameters and buffers, integers too."""
        return self._apply(lambda x: x.to(dst_type))

    def float(self: Self) -> Self:
        return self.to(dtypes.float32)

    def double(self: Self) -> Self:
        return self.to(dtypes.float64)

    def half(self: Self) -> Self:
        return self.to(dtypes.float16)

    def bfloat16(self: Self) -> Self:
        return self.to(dtypes.bfloat16)

    def cpu(self: Self) -> Self:
        """Everything into the computer's own memory."""
        return self.to("cpu")

    def cuda(self: Self, device: Any = None) -> Self:
        """Everything onto a GPU, by default the current one."""
        return self._apply(lambda x: x.cuda(device))

    # --- saving ---------------------------------------------------------------------------------------------------

    def state_dict(self, *, destination: dict[str, Any] | None = None, prefix: str = "",
                   keep_vars: bool = False) -> dict[str, Any]:
        """All parameters and persistent buffers by dotted name, detached unless `keep_vars`; they share memory with
        the module."""
        result: dict[str, Any] = OrderedDict() if destination is None else destination
        return state.collect(self, result, prefix, keep_vars)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True,
                        assign: bool = False) -> state.IncompatibleKeys:
        """Copy values of those names in; if anything does not fit, raise with all of it and change nothing.

        Not `strict` allows missing and unexpected names (never wrong shapes). With `assign` the given Tensors
        themselves become the parameters and buffers."""
        return state.load(self, state_dict, strict, assign)

    def get_extra_state(self) -> Any:
        """Override, with `set_extra_state`, to put more than Tensors into the state dict."""
        raise NotImplementedError(f"{type(self).__name__}: define get_extra_state")

    def set_extra_state(self, value: Any) -> None:
        raise NotImplementedError(f"{type(self).__name__}: define set_extra_state")

    def _has_extra_state(self) -> bool:
        return type(self).get_extra_state is not Module.get_extra_state

    # --- hooks ----------------------------------------------------------------------------------------------------

    def register_forward_pre_hook(self, hook: Callable[..., Any], *, prepend: bool = False,
                                  with_kwargs: bool = False) -> RemovableHandle:
        """``hook(module, args)`` before forward; what it returns replaces the arguments."""
        return self._forward_pre_hooks.add(Hook(hook, with_kwargs), prepend)

    def register_forward_hook(self, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False,
                              always_call: bool = False) -> RemovableHandle:
        """``hook(module, args, output)`` after forward; what it returns replaces the output."""
        return self._forward_hooks.add(Hook(hook, with_kwargs, always_call), prepend)

    def register_full_backward_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """``hook(module, grad_output)`` before the module's backward; what it returns replaces `grad_output`."""
        return self._backward_pre_hooks.add(Hook(hook), prepend)

    def register_full_backward_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        """``hook(module, grad_input, grad_output)`` after it; what it returns replaces `grad_input`."""
        return self._backward_hooks.add(Hook(hook), prepend)

    def register_state_dict_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """``hook(module, state_dict, prefix)`` when this module's entries have been written."""
        return self._state_dict_hooks.add(Hook(hook))

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """``hook(module, state_dict, prefix)`` before loading; it may change this copy of the dict."""
        return self._load_state_dict_pre_hooks.add(Hook(hook))

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """``hook(module, incompatible_keys)`` after loading; it may edit the two lists."""
        return self._load_state_dict_post_hooks.add(Hook(hook))

    # --- showing --------------------------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """Override: what stands between the parentheses of ``repr``."""
        return ""

    def _get_name(self) -> str:
        return type(self).__name__

    def __repr__(self) -> str:
        extra = self.extra_repr().split("\n") if self.extra_repr() else []
        below = [f"({name}): {_indent(repr(module))}" for name, module in self._modules.items()]
        if len(extra) == 1 and not below:
            return f"{self._get_name()}({extra[0]})"
        lines = extra + below
        return f"{self._get_name()}(" + ("\n  " + "\n  ".join(lines) + "\n" if lines else "") + ")"


def _indent(text: str) -> str:
    """`text` with all lines but the first moved right."""
    return text.replace("\n", "\n  ")


def _read_destination(args: Iterable[Any], kwargs: dict[str, Any]) -> tuple[Any, DType | None, bool]:
    """Device, dtype and `non_blocking` from any of the forms of ``to``."""
    device, dtype, non_blocking = kwargs.get("device"), kwargs.get("dtype"), bool(kwargs.get("non_blocking", False))
    for argument in args:
        if isinstance(argument, DType):
            dtype = argument
        elif isinstance(argument, Tensor):
            device, dtype = argument.device, argument.dtype
        elif isinstance(argument, bool):
            non_blocking = argument
        elif argument is not None:
            device = argument
    return device, dtype, non_blocking
