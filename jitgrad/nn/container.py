"""Containers: Modules and Parameters in lists, dicts and pipelines, so that they are found and saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from jitgrad import changes
from jitgrad.nn.module import Module
from jitgrad.nn.parameter import Parameter
from jitgrad.tensor import Tensor

Member = TypeVar("Member")


class _Ordered(Module, Generic[Member]):
    """Members named "0", "1", …, kept in the table called `_table`."""

    _table = "_modules"

    @property
    def _members(self) -> dict[str, Any]:
        return self.__dict__[self._table]

    def _accept(self, member: Any) -> Any:
        """`member` as it is stored; TypeError when it does not belong here."""
        if member is not None and not isinstance(member, Module):
            raise TypeError(f"{type(self).__name__}: {type(member).__name__} is not a Module")
        return member

    def _replace(self, members: Iterable[Any]) -> None:
        """Make exactly `members` the contents, numbered anew."""
        accepted = [self._accept(member) for member in members]
        self._members.clear()
        self._members.update((str(k), member) for k, member in enumerate(accepted))
        changes.bump()

    def _key(self, index: int) -> str:
        names = list(self._members)
        if not -len(names) <= index < len(names):
            raise IndexError(f"{type(self).__name__}: index {index} is out of range for {len(names)} members")
        return names[index]

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return type(self)._of(list(self)[index])
        return self._members[self._key(index)]

    @classmethod
    def _of(cls, members: Iterable[Any]) -> _Ordered[Member]:
        return cls(members)         # type: ignore[call-arg]

    def __setitem__(self, index: int, member: Member) -> None:
        self._members[self._key(index)] = self._accept(member)
        changes.bump()

    def __delitem__(self, index: int | slice) -> None:
        members = list(self)
        del members[index]
        self._replace(members)

    def append(self: Any, member: Member) -> Any:
        self._replace([*self, member])
        return self

    def extend(self: Any, members: Iterable[Member]) -> Any:
        self._replace([*self, *members])
        return self

    def insert(self, index: int, member: Member) -> None:
        members = list(self)
        members.insert(index, member)
        self._replace(members)

    def pop(self, index: int = -1) -> Member:
        member = self[index]
        del self[index]
        return member

    def __iadd__(self: Any, members: Iterable[Member]) -> Any:
        return self.extend(members)


class ModuleList(_Ordered[Module]):
    """A list of Modules."""

    def __init__(self, modules: Iterable[Module] | None = None):
        super().__init__()
        self._replace(modules or ())

    def __add__(self, other: Iterable[Module]) -> ModuleList:
        return ModuleList([*self, *other])


class Sequential(_Ordered[Module]):
    """Modules applied one after the other; made from Modules, or from one dict of named ones."""

    def __init__(self, *modules: Module | Mapping[str, Module]):
        super().__init__()
        if len(modules) == 1 and isinstance(modules[0], Mapping):
            for name, module in modules[0].items():
                self.add_module(name, module)
        else:
            self._replace(modules)

    @classmethod
    def _of(cls, members: Iterable[Module]) -> Sequential:
        return cls(*members)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            chosen = list(self._modules.items())[index]
            return type(self)({name: module for name, module in chosen if module is not None})     # keeps the names
        return super().__getitem__(index)

    def __add__(self, other: Sequential) -> Sequential:
        return Sequential(*self, *other)

    def forward(self, input: Any) -> Any:
        for module in self:
            input = module(input)
        return input


class ParameterList(_Ordered[Parameter]):
    """A list of Parameters; Tensors that are not become some."""

    _table = "_parameters"

    def __init__(self, values: Iterable[Tensor] | None = None):
        super().__init__()
        self._replace(values or ())

    def _accept(self, member: Any) -> Any:
        return _as_parameter(self, member)

    def extra_repr(self) -> str:
        return "\n".join(f"({name}): {_describe(param)}" for name, param in self._parameters.items())


class _Named(Module, Generic[Member]):
    """Members by name, kept in the table called `_table`, in order of insertion."""

    _table = "_modules"

    def __init__(self, members: Mapping[str, Member] | Iterable[tuple[str, Member]] | None = None):
        super().__init__()
        self.update(members or {})

    @property
    def _members(self) -> dict[str, Any]:
        return self.__dict__[self._table]

    def _enter(self, name: str, member: Any) -> None:
        self.add_module(name, member)

    def __getitem__(self, name: str) -> Member:
        return self._members[name]

    def __setitem__(self, name: str, member: Member) -> None:
        self._enter(name, member)

    def __delitem__(self, name: str) -> None:
        del self._members[name]
        changes.bump()

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._members))

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def keys(self) -> Iterable[str]:
        return self._members.keys()

    def values(self) -> Iterable[Member]:
        return self._members.values()

    def items(self) -> Iterable[tuple[str, Member]]:
        return self._members.items()

    def get(self, name: str, default: Any = None) -> Any:
        return self._members.get(name, default)

    def pop(self, name: str) -> Member:
        member = self._members[name]
        del self[name]
        return member

    def clear(self) -> None:
        self._members.clear()
        changes.bump()

    def update(self, members: Mapping[str, Member] | Iterable[tuple[str, Member]]) -> None:
        pairs = members.items() if hasattr(members, "items") else members
        for name, member in pairs:
            self[name] = member


class ModuleDict(_Named[Module]):
    """A dict of Modules."""


class ParameterDict(_Named[Parameter]):
    """A dict of Parameters; Tensors that are not become some."""

    _table = "_parameters"

    def _enter(self, name: str, member: Any) -> None:
        self.register_parameter(name, _as_parameter(self, member))

    def extra_repr(self) -> str:
        return "\n".join(f"({name}): {_describe(param)}" for name, param in self._parameters.items())


def _as_parameter(owner: Module, value: Any) -> Parameter:
    if isinstance(value, Parameter):
        return value
    if isinstance(value, Tensor):
        return Parameter(value, requires_grad=value.dtype.is_floating_point)
    raise TypeError(f"{type(owner).__name__}: {type(value).__name__} is not a Parameter or a Tensor")


def _describe(param: Parameter | None) -> str:
    """``Parameter of float32, (3, 4)``: one line instead of all the numbers."""
    return "None" if param is None else f"Parameter of {param.dtype.name}, {tuple(param.shape)}"
