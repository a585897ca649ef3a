"""Where the Tensors are that a sealed call uses: how each of them is found again by the calls to come.

A place is one of three things: the number of a leaf of the arguments; ``(table, name)``, an entry of a Module's tables
or of an optimizer's state, protected by the counter of changes; or a function of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jitgrad.autograd import no_grad
from jitgrad.compile.evaluator import Findings
from jitgrad.compile.values import Impure
from jitgrad.devices import device
from jitgrad.dtypes import DType
from jitgrad.tensor import Tensor

Fetch = Callable[[Any], Any]              # (arguments, their leaves) of a call -> the Tensor


def leaf_signature(leaf: Any) -> Any:
    """What a sealed call takes for granted about one leaf of its arguments; None: such a call cannot be sealed."""
    if isinstance(leaf, Tensor):
        array = leaf._array
        if array is None or leaf._history_node() is not None or leaf._hooks:
            return None
        kept = array.dtype, array.shape, array.strides, leaf._requires_grad and (1 if leaf._grad is None else 2)
        return kept if type(array) is np.ndarray else (*kept, array.gpu)
    kind = type(leaf)
    if kind is float or kind is int:
        return kind
    if kind in (bool, str, type(None), bytes, complex, DType, device):
        return kind, leaf
    return None if isinstance(leaf, np.ndarray) else id(leaf)


class Places:
    """The places of all Tensors that a function can reach, as they are now, which is before the call: the body may bind
    others to them. `gradients`: the ``.grad`` of each, by id; `with_history`: ids of those that are no leaves;
    `repeated`: one of the arguments is found in a second place too, which it need not be next time."""

    def __init__(self, findings: Findings, call: Any):
        self._places: dict[int, Any] = {}
        self._tables: dict[tuple[int, Any], Tensor] = {}
        self._signatures: dict[int, Any] = {}
        self.gradients: dict[int, Tensor] = {}
        self.with_history: set[int] = set()
        self._held: list[Tensor] = []     # so that no other Tensor gets the id of one of them
        self.repeated = False
        for k, leaf in enumerate(call[1]):
            self._add(leaf, k)
        for module in findings.modules.values():
            for table in (module._parameters, module._buffers, module.__dict__):
                for name, value in table.items():
                    self._add(value, (table, name))
        for optimizer in findings.optimizers.values():
            self._add_optimizer(optimizer)
        for scaler in findings.scalers.values():
            for name in ("_scale", "_growth_tracker"):
                self._add(getattr(scaler, name), (scaler.__dict__, name))
        for path in findings.tensors.values():
            if not path.is_leaf:
                self._add(path.fetch(call[0]), lambda call, path=path: path.fetch(call[0]))

    def _add_optimizer(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for k, p in enumerate(group["params"]):
                self._add(p, (group["params"], k))
            for name, value in group.items():
                self._add(value, (group, name))
        for entry in optimizer.state.values():
            for name, value in entry.items():
                self._add(value, (entry, name))

    def _add(self, tensor: Any, place: Any) -> None:
        if not isinstance(tensor, Tensor):
            return
        known = self._places.setdefault(id(tensor), place)
        self.repeated = self.repeated or (known is not place and int in (type(known), type(place)))
        self._held.append(tensor)
        if type(place) is tuple:
            self._tables[id(place[0]), place[1]] = tensor
        elif type(place) is not int:
            self._signatures[id(tensor)] = leaf_signature(tensor)
        if tensor._history_node() is not None:
            self.with_history.add(id(tensor))
        gradient = tensor._grad
        if gradient is not None:
            self.gradients[id(tensor)] = gradient
            fetch = as_fetch(place)
            self._add(gradient, lambda call: fetch(call)._grad)

    def find(self, tensor: Tensor) -> Any:
        """The place of `tensor`, or None. A view that the body made is found by way of its root."""
        place = self._places.get(id(tensor))
        root = tensor._root
        if place is not None or root is None or id(root) not in self._places:
            return place
        place = self._places[id(root)]
        if not tensor._chain:
            return place                              # detach() and state_dict() make such aliases
        fetch, chain = as_fetch(place), tensor._chain
        return lambda call: moved_view(fetch(call), chain)

    def conditions(self, tensor: Tensor) -> list[tuple[Fetch, Any]]:
        """What must be so in the next calls for `tensor` to be found again: how to fetch a Tensor, and its signature."""
        outer = tensor if id(tensor) in self._places else tensor._root
        if id(outer) not in self._signatures:
            return []                                 # looked at with the arguments, or by the counter of changes
        if self._signatures[id(outer)] is None:
            raise Impure(f"uses a tensor ({tensor.tensor_type}) with a history or hooks", None)
        return [(self._places[id(outer)], self._signatures[id(outer)])]

    def entry(self, table: Any, name: Any) -> Tensor | None:
        """The Tensor that was at ``table[name]``."""
        return self._tables.get((id(table), name))

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._places


def moved_view(tensor: Tensor, chain: Any) -> Tensor:
    """The view of `tensor` through a chain of movement ops, without a history."""
    with no_grad():
        view = tensor if chain else tensor._alias()
        for op, attrs in chain:
            view = op(view, **attrs)
    return view


def as_fetch(place: Any) -> Fetch:
    """A place as a function of the call."""
    if type(place) is int:
        return lambda call: call[1][place]
    if type(place) is tuple:
        table, name = place
        return lambda call: table[name]
    return place  # type: ignore[no-any-return]
