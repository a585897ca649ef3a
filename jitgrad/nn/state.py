"""State dicts of Modules: collecting them, and loading them without losing anything.

`load` works in two passes. The first compares names and shapes over the whole tree and changes nothing; only when all
of it fits does the second copy the values. Values may be Tensors or anything that NumPy can read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jitgrad.autograd import no_grad
from jitgrad.nn.parameter import Parameter
from jitgrad.tensor import Tensor

if TYPE_CHECKING:
    from jitgrad.nn.module import Module

EXTRA_STATE = "_extra_state"


class IncompatibleKeys(NamedTuple):
    """What `load` found missing in the state dict, and what it found unexpected."""

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        return f"IncompatibleKeys(missing_keys={self.missing_keys}, unexpected_keys={self.unexpected_keys})"


class _Place(NamedTuple):
    """Where one entry of a state dict belongs."""

    key: str
    module: Module
    table: str
    name: str

    @property
    def tensor(self) -> Tensor:
        return self.module.__dict__[self.table][self.name]


def collect(module: Module, result: dict[str, Any], prefix: str, keep_vars: bool) -> dict[str, Any]:
    """Enter the state of `module` and everything below into `result`, which is returned."""
    for place in _own_places(module, prefix):
        result[place.key] = place.tensor if keep_vars else place.tensor.detach()
    if module._has_extra_state():
        result[prefix + EXTRA_STATE] = module.get_extra_state()
    for name, child in module._modules.items():
        if child is not None:
            child.state_dict(destination=result, prefix=f"{prefix}{name}.", keep_vars=keep_vars)
    for hook in module._state_dict_hooks:
        hook.function(module, result, prefix)
    return result


def load(module: Module, state_dict: Mapping[str, Any], strict: bool, assign: bool) -> IncompatibleKeys:
    """See `Module.load_state_dict`."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"load_state_dict: expected a dict of Tensors, got a {type(state_dict).__name__}")
    entries = OrderedDict(state_dict)
    tree = list(module.named_modules(remove_duplicate=False))
    for path, part in tree:
        for hook in part._load_state_dict_pre_hooks:
            hook.function(part, entries, _prefix(path))
    places = [place for path, part in tree for place in _own_places(part, _prefix(path))]
    extras = {_prefix(path) + EXTRA_STATE: part for path, part in tree if part._has_extra_state()}
    found = _compare(module, entries, [p.key for p in places] + list(extras))
    _refuse(module, found if strict else IncompatibleKeys([], []), _mismatches(entries, places))
    with no_grad():
        for place in places:
            if place.key in entries:
                _store(place, entries[place.key], assign)
    for key, part in extras.items():
        if key in entries:
            part.set_extra_state(entries[key])
    for _, part in tree:
        for hook in part._load_state_dict_post_hooks:
            hook.function(part, found)
    return found


def _prefix(path: str) -> str:
    return path + "." if path else ""


def _own_places(module: Module, prefix: str) -> Iterator[_Place]:
    """The entries of `module` itself: parameters, then persistent buffers."""
    for table in ("_parameters", "_buffers"):
        for name, tensor in module.__dict__[table].items():
            if tensor is not None and not (table == "_buffers" and name in module._non_persistent):
                yield _Place(prefix + name, module, table, name)


def _compare(module: Module, entries: Mapping[str, Any], expected: list[str]) -> IncompatibleKeys:
    known = set(expected)
    missing = [key for key in expected if key not in entries]
    return IncompatibleKeys(missing, [key for key in entries if key not in known])


def _mismatches(entries: Mapping[str, Any], places: list[_Place]) -> list[str]:
    """One line for each entry whose value cannot become what it is meant for."""
    lines = []
    for place in places:
        if place.key not in entries:
            continue
        value, wanted = entries[place.key], tuple(place.tensor.shape)
        shape = getattr(value, "shape", None)
        if shape is None:
            lines.append(f"not a tensor: {place.key} is a {type(value).__name__}")
        elif tuple(shape) != wanted:
            lines.append(f"size mismatch for {place.key}: the state dict has {tuple(shape)}, the model {wanted}")
    return lines


def _refuse(module: Module, found: IncompatibleKeys, mismatches: list[str]) -> None:
    lines = [f"{what} key(s) in state_dict: {', '.join(map(repr, keys))}"
             for what, keys in (("Missing", found.missing_keys), ("Unexpected", found.unexpected_keys)) if keys]
    lines += mismatches
    if lines:
        raise RuntimeError(f"Error(s) in loading state_dict for {type(module).__name__} (nothing was changed):\n\t"
                           + "\n\t".join(lines))


def _store(place: _Place, value: Any, assign: bool) -> None:
    current = place.tensor
    given = value if isinstance(value, Tensor) else Tensor(np.asarray(value))
    if not assign:
        current.copy_(given)
        return
    if isinstance(current, Parameter) and not isinstance(given, Parameter):
        given = Parameter(given, current.requires_grad)
    setattr(place.module, place.name, given)
