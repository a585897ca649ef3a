"""The Tensor: what a user holds. An array in memory, or, while a function is being compiled, one still to be computed.

A Tensor is a *root*, which owns memory, or a *view*: a chain of movement ops on a root. An in-place change of any of
them goes through `Tensor._assign`, raises the root's version, and renews the history of the root and of its views.
The arithmetic and the named methods are in `functional.methods`, devices in `placement`; here are memory, history and
reading values.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jitgrad import autograd, changes, devices, dtypes, ops, process
from jitgrad.dtypes import DType
from jitgrad.errors import AutogradError, DTypeError, ShapeError, complain, user_location
from jitgrad.functional.methods import TensorMethods
from jitgrad.hooks import Hook, HookTable, RemovableHandle
from jitgrad.ir import interpreter
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType
from jitgrad.placement import HostMemoryError, Placement
from jitgrad.runtime.cuda.array import DeviceArray, to_host
from jitgrad.shapes import is_contiguous

_DTYPES = dtypes._BY_NUMPY
_ndarray = np.ndarray

Chain = tuple[tuple[Op, dict[str, Any]], ...]


class Tensor(Placement, TensorMethods):
    """A dense array with PyTorch's methods. Make one with `jitgrad.tensor`, `jitgrad.from_numpy`, or an op."""

    # Class attributes are the defaults of instances, so that making one writes a single field.
    _array: Any = None                      # np.ndarray or DeviceArray, or None while it is still to be computed
    _type: Any = None                       # a TensorType, when there is no _array yet
    _pending: Any = None                    # the recorder's state of a root that is still to be computed
    _root: Tensor | None = None             # None: this tensor is a root
    _chain: Chain = ()                      # from the root to this view
    _differentiable_view = True             # False: shares memory only (detach)
    _version = 0
    _renewals = 0                           # of a root: how often its history was replaced by an in-place change
    _seen = 0                               # of a view: the root's renewals that its history belongs to
    _node: Any = None
    _index = 0
    _requires_grad = False
    _grad: Tensor | None = None
    _hooks: HookTable | None = None
    _retains = False
    _is_inference = False
    _unplaced = False                       # made by ops of nothing that lies anywhere: it goes where it is needed
    _saved_from: Any = None                 # weak reference to the tensor that the tape saved this one for

    is_sparse = is_quantized = is_meta = False          # every tensor is dense and has memory

    __array_priority__ = 1000
    __hash__ = object.__hash__

    def __init__(self, array: Any, requires_grad: bool = False):
        self._array = array if type(array) in _ARRAYS else np.asarray(array)
        dtypes.from_numpy(self._array.dtype)
        if requires_grad:
            self.requires_grad = True

    # --- what it is ------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        array = self._array
        return array.shape if array is not None else self._type.shape

    @property
    def dtype(self) -> DType:
        array = self._array
        return _DTYPES[array.dtype] if array is not None else self._type.dtype

    @property
    def tensor_type(self) -> TensorType:
        """dtype, shape and device in one, as graphs have it."""
        array = self._array
        if type(array) is _ndarray:
            return _intern(_DTYPES[array.dtype], array.shape)
        return self._type if array is None else _intern(_DTYPES[array.dtype], array.shape, str(array.device))

    @property
    def is_leaf(self) -> bool:
        return self._history_node() is None

    @property
    def grad_fn(self) -> Any:
        return self._history_node()

    @property
    def requires_grad(self) -> bool:
        return self._requires_grad or self._history_node() is not None

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        value = bool(value)
        if value and not self.dtype.is_differentiable:
            raise complain(DTypeError, "requires_grad", "only floating-point and complex tensors can require gradients, "
                           f"not {self.dtype.short}", fix="Did you mean x.float().requires_grad_()?")
        if not value and self._history_node() is not None:
            raise complain(AutogradError, "requires_grad", "this tensor has a history", fix="Use detach() instead")
        if value != self._requires_grad:
            self._requires_grad = value
            changes.bump()

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        self.requires_grad = requires_grad
        return self

    @property
    def grad(self) -> Tensor | None:
        """The accumulated gradient of a leaf, or None."""
        return self._grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None and value.shape != self.shape:
            raise complain(ShapeError, "grad", f"a gradient {value.tensor_type} for a tensor {self.tensor_type}")
        self._set_grad(value)

    def _set_grad(self, value: Tensor | None) -> None:
        if (value is None) != (self._grad is None):
            changes.bump()
            if value is None:
                interpreter.state.current.cleared(self)  # type: ignore[union-attr]
        self._grad = value

    # --- history ---------------------------------------------------------------------------------------------------

    def _history_node(self) -> Any:
        """The tape node that made this tensor. A view of a root whose history was renewed derives its own again."""
        root = self._root
        if root is not None and self._seen != root._renewals and self._differentiable_view:
            self._seen = root._renewals
            if root._node is None and not root._requires_grad:
                self._node = None
            else:
                with autograd.enable_grad():
                    fresh = root
                    for op, attrs in self._chain:
                        fresh = op(fresh, **attrs)
                self._node, self._index = fresh._node, fresh._index
        return self._node

    def _count(self) -> int:
        if self._saved_from is not None:
            original = self._saved_from()
            return self._version if original is None else original._count()
        root = self._root
        return self._version if root is None else root._version

    def _for_tape(self) -> Tensor:
        """The same memory without history, for the node that made this tensor: it keeps the values alive, but not the
        tensor, which holds that node."""
        t = _new(Tensor)
        t._array, t._type, t._pending = self._array, self._type, self._pending
        t._saved_from, t._version = weakref.ref(self), self._count()
        t._unplaced = self._unplaced
        if self._array is None:
            interpreter.state.current.adopt(t)       # type: ignore[union-attr]
        return t

    def _alias(self) -> Tensor:
        """The same memory without history."""
        t = _new(Tensor)
        t._array, t._type = self._array, self._type
        t._root, t._chain = (self if self._root is None else self._root), self._chain
        t._differentiable_view = False
        t._unplaced = self._unplaced
        if self._array is None:
            t._pending = self._pending
            interpreter.state.current.adopt(t)       # type: ignore[union-attr]
        return t

    def _own(self) -> Tensor:
        """A tensor of the same contents that shares memory with nothing that anybody else holds."""
        return interpreter.state.current.own(self)    # type: ignore[union-attr]

    def detach(self) -> Tensor:
        """The same memory, outside of the recorded history."""
        return self._alias()

    def detach_(self) -> Tensor:
        self._node, self._requires_grad = None, False
        changes.bump()
        return self

    @property
    def data(self) -> Tensor:
        return self._alias()

    @data.setter
    def data(self, value: Tensor) -> None:
        """Let this tensor use the memory of `value` from now on."""
        self._array, self._type = value._forced(), None
        self._root, self._chain = None, ()
        changes.bump()

    def backward(self, gradient: Tensor | None = None, retain_graph: bool | None = None, create_graph: bool = False,
                 inputs: Any = None) -> None:
        """See `autograd.backward`."""
        autograd.backward([self], [gradient], retain_graph, create_graph, inputs)

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """`hook(gradient)` runs when the gradient of this tensor is known; what it returns, if anything, takes its
        place."""
        node = self._history_node()
        if self._array is None:
            interpreter.state.current.hooked = True  # type: ignore[union-attr]
        if node is not None:
            return autograd.add_hook(node, self._index, hook)
        if not self._requires_grad:
            raise complain(AutogradError, "register_hook", "this tensor does not require gradients")
        return self._leaf_hooks().add(Hook(hook))

    def _leaf_hooks(self) -> HookTable:
        if self._hooks is None:
            self._hooks = HookTable()
        return self._hooks

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], None]) -> RemovableHandle:
        """`hook(tensor)` runs whenever ``backward`` has added to the ``.grad`` of this leaf: a place for an optimizer's step
        that frees the gradient at once."""
        if not self._requires_grad or self._history_node() is not None:
            raise complain(AutogradError, "register_post_accumulate_grad_hook",
                           "this tensor is no leaf that requires gradients")
        return self._leaf_hooks().add(Hook(hook, after_accumulation=True))

    def retain_grad(self) -> None:
        """Keep the gradient of this non-leaf tensor in ``.grad``."""
        if self.is_leaf or self._retains:
            return
        self._retains = True
        reference = weakref.ref(self)

        def keep(gradient: Tensor) -> None:
            tensor = reference()
            if tensor is not None:
                tensor._set_grad(gradient if tensor._grad is None else ops.add(tensor._grad, gradient))

        self.register_hook(keep)

    @property
    def retains_grad(self) -> bool:
        return self._retains

    # --- changing in place -----------------------------------------------------------------------------------------

    def _assign(self, value: Tensor) -> Tensor:
        """Overwrite the contents with those of `value` (same shape and dtype): every in-place operation ends here."""
        if value.dtype is not self.dtype or value.shape != self.shape:
            raise complain(ShapeError if value.shape != self.shape else DTypeError, "in-place operation",
                           f"the result is {value.tensor_type}, but it must be stored into {self.tensor_type}",
                           fix="Use the out-of-place form")
        root = self._root if self._root is not None else self
        tracked = autograd.mode.enabled
        if tracked and self._differentiable_view:
            if root._requires_grad and root._node is None:
                raise complain(AutogradError, "in-place operation", "a leaf that requires gradients (or a view of one) "
                               "is changed in place", where=user_location(),
                               fix="Do it under no_grad(), or on a clone()")
            renew = value.requires_grad or root._node is not None
        else:
            renew = False
        if renew and value._requires_grad and value._history_node() is None:
            value = ops.cast(value, dtype=value.dtype)      # a leaf has no history that these contents could have
        new_root = _write_through(root, self._chain, value) if renew and self._chain else value
        interpreter.state.current.store(self, value)  # type: ignore[union-attr]
        root._version += 1
        if renew:
            if root._node is None:
                changes.bump()
            root._node, root._index = new_root._history_node(), new_root._index
            root._renewals += 1
        return self

    # --- reading values --------------------------------------------------------------------------------------------

    def _forced(self) -> np.ndarray:
        """The array; while compiling, everything recorded so far runs first if it has to."""
        return interpreter.state.current.force(self)  # type: ignore[union-attr]

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """The values as a NumPy array that shares memory with this tensor. With `force` the history is left aside, and
        values on a GPU are copied."""
        if self.requires_grad and not force:
            raise complain(AutogradError, "numpy", "this tensor requires gradients, which NumPy would not see",
                           fix="Use x.detach().numpy()")
        if force:
            return self._on_host()
        array: Any = self._forced()
        if type(array) is DeviceArray:
            raise complain(HostMemoryError, "numpy", f"NumPy cannot read {self.tensor_type}", fix="Use x.cpu().numpy()")
        return array

    def _on_host(self) -> np.ndarray:
        """The values in the computer's own memory; on a GPU its work comes first."""
        array: Any = self._forced()
        return to_host(array) if type(array) is DeviceArray else array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        if dtype is not None and array.dtype != dtype:
            return array.astype(dtype)
        return array.copy() if copy else array

    def item(self) -> Any:
        """The value of a tensor of one element as a Python number."""
        deferred = interpreter.state.current.defer(self)  # type: ignore[union-attr]
        return self._number() if deferred is None else deferred

    def _number(self) -> Any:
        self._forced()
        return self._element()

    def _element(self) -> Any:
        array = self._array
        if array.size != 1:
            raise complain(ShapeError, "item", f"only a tensor of one element is a number, this is {self.tensor_type}",
                           fix="Use tolist() for all of them")
        if type(array) is DeviceArray:
            array = to_host(array)
        return array.item() if self.dtype is not dtypes.bfloat16 else float(array.reshape(()))

    def tolist(self) -> Any:
        array = self._on_host()
        return (array.astype(np.float32) if self.dtype is dtypes.bfloat16 else array).tolist()

    def __bool__(self) -> bool:
        if self.tensor_type.size != 1:
            raise complain(ShapeError, "bool", f"the truth of {self.tensor_type} is ambiguous",
                           fix="Use any() or all()")
        return interpreter.state.current.decide(self, bool)  # type: ignore[union-attr]

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return interpreter.state.current.decide(self, int)  # type: ignore[union-attr]

    def __complex__(self) -> complex:
        return complex(self.item())

    def __index__(self) -> int:
        if not (self.dtype.is_integer or self.dtype is dtypes.bool_) or self.tensor_type.size != 1:
            raise TypeError(f"only an integer tensor of one element can be an index, not {self.tensor_type}")
        return interpreter.state.current.decide(self, int)  # type: ignore[union-attr]

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if not self.shape and spec else format(repr(self), spec)

    def __repr__(self) -> str:
        return _describe(self)

    def __iter__(self) -> Iterator[Any]:
        if not self.shape:
            raise TypeError("iteration over a 0-d tensor")
        return iter(self.unbind(0))

    # --- memory ----------------------------------------------------------------------------------------------------

    def stride(self, dim: int | None = None) -> Any:
        """Strides in elements. While compiling those that eager execution would give."""
        strides = tuple(s // self.dtype.itemsize for s in self._array.strides) if self._array is not None \
            else interpreter.state.current.strides(self)  # type: ignore[union-attr]
        return strides if dim is None else strides[dim]

    def storage_offset(self) -> int:
        """How many elements of its base lie in memory before the first one of this view; 0 for what is no view."""
        root = self if self._root is None else self._root
        return int(self.data_ptr() - root.data_ptr()) // self.dtype.itemsize

    def is_contiguous(self) -> bool:
        return is_contiguous(self.shape, self.stride())

    def element_size(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.tensor_type.nbytes

    @property
    def _base(self) -> Tensor | None:
        return self._root if self._differentiable_view else None

    def _is_view(self) -> bool:
        return self._root is not None and self._differentiable_view

    def is_inference(self) -> bool:
        return self._is_inference

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if self._history_node() is not None:
            raise complain(AutogradError, "deepcopy", "only leaf tensors can be copied deeply",
                           fix="Use x.detach().clone()")
        fresh = _new(type(self))
        memo[id(self)] = fresh
        fresh._array = self._forced().copy()
        fresh._requires_grad = self._requires_grad
        if self._grad is not None:
            fresh._grad = copy.deepcopy(self._grad, memo)
        for name, value in self.__dict__.items():
            if not name.startswith("_"):
                fresh.__dict__[name] = copy.deepcopy(value, memo)
        return fresh

    def __reduce__(self) -> Any:
        return _restore, (type(self), self._on_host().copy(), self._requires_grad, self.device_name)


_new = object.__new__
_ARRAYS = (_ndarray, DeviceArray)


@functools.lru_cache(maxsize=4096)
def _intern(dtype: DType, shape: tuple[int, ...], device: str = "cpu") -> TensorType:
    return TensorType(dtype, shape, device)


def _restore(cls: type[Tensor], array: np.ndarray, requires_grad: bool, device: str = "cpu") -> Tensor:
    fresh = _new(cls)
    fresh._array, fresh._requires_grad = tensor_on(array, device)._array, requires_grad
    return fresh


def _wrap(array: Any) -> Tensor:
    """A root around an array, unchecked."""
    t = _new(Tensor)
    t._array = array if type(array) in _ARRAYS else np.asarray(array)
    return t


def tensor_on(array: np.ndarray, device: Any = None) -> Tensor:
    """A Tensor around a NumPy array on the CPU, or of a copy of it on `device`; None: on the default one."""
    tensor, where = Tensor(array), devices.chosen(device)
    return tensor if where is None else tensor._moved(where)


def _write_through(root: Tensor, chain: Chain, value: Tensor) -> Tensor:
    """The contents of `root` after `value` was stored into the view that `chain` makes of it, as a new tensor."""
    if not chain:
        return value
    (op, attrs), rest = chain[0], chain[1:]
    inner = _write_through(op(root, **attrs), rest, value) if rest else value
    return undo_movement(op, attrs, root, inner)


def undo_movement(op: Op, attrs: dict[str, Any], base: Any, value: Any) -> Any:
    """`base` with the region that movement `op` selects replaced by `value`."""
    if op is ops.reshape:
        return ops.reshape(value, shape=tuple(base.shape))
    if op is ops.permute:
        axes = attrs["axes"]
        return ops.permute(value, axes=tuple([axes.index(k) for k in range(len(axes))]))
    if op is ops.flip:
        return ops.flip(value, axes=attrs["axes"])
    if op is ops.slice:
        return ops.slice_update(base, value, start=attrs["start"], step=attrs["step"])
    raise complain(ShapeError, "in-place operation", "several elements of an expanded tensor share one memory location",
                   where=user_location(), fix="clone() it before the change")


def assign(values: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Overwrite each target with the value of its own."""
    for value, target in zip(values, targets, strict=True):
        target._assign(value)


def is_tensor(obj: Any) -> bool:
    """Whether `obj` is a Tensor."""
    return isinstance(obj, Tensor)


def _describe(tensor: Tensor) -> str:
    array = tensor._on_host()
    if tensor.dtype is dtypes.bfloat16:
        array = array.astype(np.float32)
    text = np.array2string(array, separator=", ", prefix="tensor(", **process.numpy_options(array.dtype.kind == "f"))
    implied = tensor.dtype in (dtypes.get_default_dtype(), dtypes.int64, dtypes.bool_)
    extra = "" if implied and array.size else f", dtype={tensor.dtype!r}"
    if tensor.is_cuda:
        extra = f", device='{tensor.device}'" + extra
    if 0 in array.shape and array.ndim > 1:
        extra = f", size={array.shape}" + extra
    node = tensor._history_node()
    if node is not None:
        extra += f", grad_fn=<{node.name}>"
    elif tensor._requires_grad:
        extra += ", requires_grad=True"
    return f"tensor({text}{extra})"
