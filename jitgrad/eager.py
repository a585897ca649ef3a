"""Eager execution: the interpreter that is current where no other is. Importing this module installs it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from jitgrad import autograd, gpu_ops, native_ops, ops
from jitgrad.devices import device
from jitgrad.dtypes import DType
from jitgrad.errors import AutogradError, CompileError, ShapeError, complain, user_location
from jitgrad.ir import interpreter
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType
from jitgrad.ops import blocks
from jitgrad.runtime import threads
from jitgrad.runtime.cuda import array as device_memory, dispatch
from jitgrad.runtime.cuda.array import DeviceArray
from jitgrad.tensor import Tensor, _new, _wrap, assign, undo_movement

_ndarray = np.ndarray

try:
    from sys import getrefcount as _refcount
except ImportError:                                   # an interpreter without reference counts: always copy
    def _refcount(_: Any, /) -> int:
        return 1 << 30


class EagerInterpreter:
    """Runs each op at once, by its NumPy reference or a ready kernel, and keeps the tape. `records`: whether derived
    operations are carried out as the primitives that they are while something is recorded."""

    records = False

    @staticmethod
    def carries_out(op: Op, inputs: tuple[Tensor, ...]) -> bool:
        """Whether a derived op is one step here: not if a gradient of it is wanted that it has no rules for."""
        return op.vjp is not None or not (autograd.mode.enabled and any([t.requires_grad for t in inputs]))

    def run(self, op: Op, inputs: tuple[Tensor, ...], attrs: dict[str, Any]) -> Any:
        """One op on Tensors; see `ir.op.Op`."""
        arrays = []
        unplaced = True
        for t in inputs:
            array = t._array
            if type(array) is not _ndarray:
                return self._run_on_gpu(op, inputs, attrs)
            arrays.append(array)
            if not t._unplaced:
                unplaced = False
        try:
            result = native_ops.carry_out(op, arrays, attrs) if native_ops.carries_out(op) else None
            if result is None:
                if op.kind == "elementwise" and arrays[0].size >= blocks.SHARED:
                    result = blocks.elementwise_in_blocks(op.eager, arrays, attrs)
                else:
                    result = op.eager(*arrays, **attrs)
        except Exception:
            op.result_types(tuple([t.tensor_type for t in inputs]), attrs)  # says what is wrong, if a type is
            raise
        if op.outputs == 1:
            out = _new(Tensor)
            out._array = result if type(result) is _ndarray else np.asarray(result)
            if unplaced:
                out._unplaced = True
            if op.view and result.base is not None:
                self._link_view(out, inputs[0], op, attrs)
            if autograd.mode.enabled:
                for t in inputs:
                    if t._requires_grad or t._node is not None or (t._root is not None and t.requires_grad):
                        autograd.record(op, inputs, attrs, (out,))
                        break
            return out
        outs = tuple([_wrap(r) for r in result])
        for t in outs if unplaced else ():
            t._unplaced = True
        if autograd.mode.enabled and any(t.requires_grad for t in inputs):
            autograd.record(op, inputs, attrs, outs)
        return outs

    def _run_on_gpu(self, op: Op, inputs: tuple[Tensor, ...], attrs: dict[str, Any]) -> Any:
        """`run` where an operand is not in the computer's own memory."""
        result = dispatch.carry_out(op, _placed([t._forced() for t in inputs], inputs), attrs)
        outs = tuple([_wrap(r) for r in ((result,) if op.outputs == 1 else result)])
        if op.view and outs[0]._array.is_view:
            self._link_view(outs[0], inputs[0], op, attrs)
        if autograd.mode.enabled and any(t.requires_grad for t in inputs):
            autograd.record(op, inputs, attrs, outs)
        return outs[0] if op.outputs == 1 else outs

    @staticmethod
    def move(tensor: Tensor, where: device, non_blocking: bool) -> Tensor:
        """A copy of `tensor` on another device."""
        return _Move.apply(tensor, where, non_blocking)

    @staticmethod
    def make_on(where: device, make: Callable[..., Any], arguments: tuple[Any, ...]) -> Tensor:
        """What `make` computes of numbers, made by kernels of a GPU; see `functional.core.made_on`."""
        try:
            return _wrap(gpu_ops.create(make, arguments, where))
        except CompileError:                                # where nothing can be compiled, the host makes it
            return make(*arguments)._moved(where)

    @staticmethod
    def transfer(tensor: Tensor, where: device, non_blocking: bool) -> Tensor:
        """The same without history."""
        return _wrap(device_memory.moved(tensor._forced(), where, non_blocking))

    def full(self, shape: tuple[int, ...], value: Any, dtype: DType) -> Tensor:
        """A constant in full shape, which nobody may change: the same few are used again and again."""
        return _constant(shape, value, dtype, str(value) if value == 0 else "")

    @staticmethod
    def _link_view(out: Tensor, source: Tensor, op: Op, attrs: dict[str, Any]) -> None:
        root = source._root
        base = root if root is not None else source
        if op is ops.reshape and not _share_memory(out._array, base._array):
            return                                    # a reshape that had to copy
        out._root = base
        out._chain = (*source._chain, (op, attrs))
        out._seen = base._renewals
        if not source._differentiable_view:
            out._differentiable_view = False

    def store(self, target: Tensor, value: Tensor) -> None:
        """Write the contents of `value` into the memory of `target`."""
        array, source = target._forced(), value._forced()
        if not array.flags.writeable:
            if any(s == 0 and n > 1 for s, n in zip(array.strides, array.shape)):
                undo_movement(ops.broadcast_to, {}, None, None)
            raise complain(ShapeError, "in-place operation", "the memory of this tensor is read-only (a NumPy array "
                           "that is not writeable)", where=user_location(), fix="clone() it before the change")
        if type(array) is _ndarray and type(source) is _ndarray:
            np.copyto(array, source)
        else:
            device_memory.copy_into(array, source)

    def rewrite(self, op: Op, inputs: tuple[Tensor, ...], attrs: dict[str, Any], targets: Sequence[Tensor]) -> None:
        """An op with a form that writes `into` memory; its results replace the contents of `targets`."""
        places = [t._array for t in targets]
        if DeviceArray in map(type, places) and not autograd.mode.enabled \
                and gpu_ops.rewrite(op, _placed([t._forced() for t in inputs], inputs), attrs, places):
            _count_write(targets)
            return
        if autograd.mode.enabled or DeviceArray in [type(t._array) for t in inputs] \
                or not all([type(a) is _ndarray and a.flags.writeable for a in places]) \
                or [v.dtype for v in attrs["body"].outputs for _ in range(attrs["groups"])] != [t.dtype for t in targets]:
            assign(self.run(op, inputs, attrs), targets)
            return
        arrays = [t._array for t in inputs]
        if not native_ops.rewrite(op, arrays, attrs, places):
            op.eager(*arrays, **attrs, into=places)
        _count_write(targets)

    def own(self, tensor: Tensor) -> Tensor:
        """`tensor` if nobody else can reach its memory, else a copy."""
        array = tensor._array
        references = _refcount(tensor), _refcount(array)
        if self.sole_references is None:
            self.sole_references = references
        # A fresh result of an op: it owns its memory, and only the frames of the walk back know it.
        sole = tensor._root is None and array.flags.owndata and array.flags.c_contiguous and type(tensor) is Tensor \
            and references[0] <= self.sole_references[0] and references[1] <= self.sole_references[1]
        return tensor if sole else _wrap(array.copy())

    def put_part(self, total: Tensor | None, given: Tensor, whole: TensorType, start: tuple[int, ...],
                 step: tuple[int, ...]) -> Tensor:
        """`given` added to that part of `total`, in place; without one, with zeros around it."""
        part = tuple([slice(first, first + n * stride, stride) for first, n, stride in zip(start, given.shape, step)])
        if total is None:
            total = _wrap(np.zeros(whole.shape, whole.dtype.numpy))
            total._array[part] = given._forced()
        else:
            total._array[part] += given._forced()
        return total

    sole_references: tuple[int, int] | None = None
    """How many references to a gradient's Tensor and array `own` counts when nothing but the walk back holds them. It
    depends on the version of Python: the first call, which is the one below, measures it."""

    def number(self, mapping: Any, *keys: Any) -> Any:
        for key in keys:
            mapping = mapping[key]
        return mapping

    def eagerly(self, make: Callable[[], Any]) -> Any:
        return make()

    def cleared(self, tensor: Tensor) -> None:
        """The gradient of `tensor` was taken away."""

    def block(self, repeatable: bool) -> AbstractContextManager[None]:
        """Around the first run of a function that the walk back runs again."""
        return nullcontext()

    def fence(self, after: Sequence[Tensor], recorded: bool) -> AbstractContextManager[None]:
        """Around a second run: it leaves the tape that the first one left, which may have been `recorded`; and nothing in
        it may be taken for what was computed before. Here nothing ever is."""
        return interpreter.interpret(_IN_PRIMITIVES) if recorded else nullcontext()

    def defer(self, tensor: Tensor) -> None:
        """A value that Python asks for is there."""

    def decide(self, tensor: Tensor, kind: type) -> Any:
        """A bool or int that Python asks for."""
        return kind(tensor._number())

    def force(self, tensor: Tensor) -> np.ndarray:
        array = tensor._array
        if array is None:
            raise complain(AutogradError, "reading a value", "this tensor belongs to a compiled call that failed or "
                           "that another thread is running", where=user_location())
        return array


class _Move(autograd.Function):
    """A copy on another device. Its gradient goes back to where the operand is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, where: device, non_blocking: bool) -> Tensor:
        ctx.origin = x.device
        return interpreter.state.current.transfer(x, where, non_blocking)  # type: ignore[union-attr]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].to(ctx.origin), None, None


def _placed(arrays: list[Any], inputs: Sequence[Tensor]) -> list[Any]:
    """The operands of an op on a GPU, of which those go there that are not placed anywhere yet; numbers need not."""
    where = next(a.device for a in arrays if type(a) is DeviceArray)
    return [device_memory.moved(a, where) if t._unplaced and a.size != 1 and any(a.strides) else a
            for a, t in zip(arrays, inputs, strict=True)]


def _count_write(targets: Sequence[Tensor]) -> None:
    for t in targets:
        (t if t._root is None else t._root)._version += 1


def _share_memory(one: Any, other: Any) -> bool:
    if type(one) is DeviceArray:
        return one.owner is other.owner
    return np.may_share_memory(one, other)


class _InPrimitives(EagerInterpreter):
    """Eager execution that leaves the tape of a recording."""

    records = True

    @staticmethod
    def carries_out(op: Op, inputs: tuple[Tensor, ...]) -> bool:
        return False


_IN_PRIMITIVES = _InPrimitives()


@functools.lru_cache(maxsize=1024)
def _constant(shape: tuple[int, ...], value: Any, dtype: DType, zero: str) -> Tensor:
    """`value` everywhere, read-only. `zero` tells 0.0 and -0.0 apart, which are equal."""
    array = np.array(value, dtype.numpy)
    array.flags.writeable = False
    made = _wrap(np.broadcast_to(array, shape) if shape else array)
    made._unplaced = True
    return made


blocks.install_thread_limit(threads.limit)
interpreter.set_default(EagerInterpreter())
autograd.backward(ops.neg(Tensor(np.zeros(1), requires_grad=True)))
