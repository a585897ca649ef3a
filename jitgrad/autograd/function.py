"""Custom differentiable functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jitgrad import ops
from jitgrad.autograd.modes import mode, no_grad
from jitgrad.autograd.tape import Edge, TapeNode, edge_of
from jitgrad.errors import AutogradError, complain
from jitgrad.ir.types import TensorType

if TYPE_CHECKING:
    pass

class FunctionNode(TapeNode):
    """The application of a custom `Function`; doubles as its context (`ctx`)."""

    __slots__ = ("__dict__", "_materialize", "_non_differentiable", "_saved", "_versions", "_wanted", "function",
                 "needs_input_grad", "types")

    def __init__(self, function: type[Function], edges: tuple[Edge, ...]):
        super().__init__(edges)
        self.function = function
        self._saved: Any = ()                         # a tuple, or who can compute it again
        self._arriving: list[Any] = []                # the gradients, while `pull` is at work
        self._versions: tuple[int, ...] = ()
        self._materialize = True
        self._non_differentiable: tuple[Any, ...] = ()
        self.needs_input_grad = tuple([e is not None for e in edges])
        self.types: tuple[TensorType, ...] = ()
        self._wanted: tuple[Any, ...] = ()            # the dtype of each input that wants a gradient

    @property
    def name(self) -> str:
        return self.function.__name__ + "Backward"

    @property
    def output_types(self) -> tuple[TensorType, ...]:
        return self.types

    def save_for_backward(self, *tensors: Any) -> None:
        self._saved = tensors
        self._versions = tuple([0 if t is None else t._count() for t in tensors])

    def give_away(self, outputs: tuple[Any, ...]) -> None:
        """After forward: let the keeper, if there is one, keep what was saved."""
        if mode.keeper is not None and self._saved:
            position = {id(t): k for k, t in enumerate(outputs)}
            edges = [None if t is None else (self, position[id(t)]) if id(t) in position else edge_of(t)
                     for t in self._saved]
            self._saved = mode.keeper.keep(self.name, self._saved, edges, False)

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        if self.freed:
            raise complain(AutogradError, self.name, "its saved tensors were freed by an earlier backward",
                           fix="Pass retain_graph=True to the first backward() or grad()")
        if type(self._saved) is not tuple:
            return self._saved.fetch(self._arriving)
        for t, version in zip(self._saved, self._versions):
            if t is not None and t._count() != version:
                raise complain(AutogradError, self.name, f"a saved tensor ({t.tensor_type}) was changed in place")
        return self._saved

    def mark_non_differentiable(self, *tensors: Any) -> None:
        self._non_differentiable = tensors

    def mark_dirty(self, *tensors: Any) -> None:
        """Inputs changed in place are found by their versions; nothing to do."""

    def set_materialize_grads(self, value: bool) -> None:
        self._materialize = value

    def pull(self, gradients: list[Any]) -> Sequence[Any]:
        if self.freed:
            raise complain(AutogradError, self.name, "backward through this part of the graph a second time",
                           fix="Pass retain_graph=True to the first backward() or grad()")
        if self._materialize:
            gradients = [ops.zeros_like(t) if g is None else g for g, t in zip(gradients, self.types)]
        self._arriving = gradients
        results = self.function.backward(self, *gradients)
        self._arriving = []
        results = results if isinstance(results, tuple) else (results,)
        if len(results) < len(self.edges):
            raise complain(AutogradError, self.name, f"backward returned {len(results)} gradients for "
                           f"{len(self.edges)} inputs", fix="Return one per input of forward, None where there is none")
        return [g if g is None or dtype is None or g.dtype is dtype else ops.cast(g, dtype=dtype)
                for g, dtype in zip(results, self._wanted)]

    def free(self) -> None:
        self.freed = True
        self._saved = ()


class Function:
    """A custom differentiable function: subclass it with static `forward` and `backward`, call `apply`.

        class Square(Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x
            @staticmethod
            def backward(ctx, g):
                x, = ctx.saved_tensors
                return 2 * x * g
        y = Square.apply(x)

    With a `setup_context(ctx, inputs, output)` method, `forward` takes no ctx."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        raise NotImplementedError("a Function needs a static forward(ctx, *args)")

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("a Function needs a static backward(ctx, *gradients)")

    setup_context: Any = None

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Run `forward` without recording; gradients flow through `backward`."""
        edges = tuple([edge_of(a) if hasattr(a, "_history_node") else None for a in args])
        node = FunctionNode(cls, edges)
        node._wanted = tuple([None if e is None else a.dtype for a, e in zip(args, edges)])
        with no_grad():
            if cls.setup_context is not None:
                result = cls.forward(*args)
                cls.setup_context(node, args, result)
            else:
                result = cls.forward(node, *args)
        if mode.enabled and any(edges):
            results = result if isinstance(result, tuple) else (result,)
            taken = {id(a) for a in args}
            outs = tuple([t._alias() if id(t) in taken else t for t in results])
            node.types = tuple([t.tensor_type for t in outs])
            skip = {id(t) for t in node._non_differentiable}
            for k, (t, original) in enumerate(zip(outs, results)):
                if t.dtype.is_differentiable and id(original) not in skip:
                    t._node, t._index = node, k
            node.give_away(results)
            result = outs if isinstance(result, tuple) else outs[0]
        return result
