"""Numba's two contexts, `TYPING` and `MACHINE`: what types there are, what type the result of an operator or a call has, and
how it becomes LLVM IR.

Kernels are made of numbers, pointers, ranges and tuples, and the contexts in here know nothing else. Arrays, strings,
containers and their overloads of every operator would take most of the time of a compilation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import types
from numba.core.callconv import create_error_model
from numba.core.cpu import CPUContext
from numba.core.typing import BaseContext
from numba.core.typing.templates import RegistryLoader, _TemplateTargetHelperMixin
from numba.cpython import builtins, iterators, numbers, rangeobj, tupleobj

LOWERINGS = (builtins, iterators, numbers, rangeobj, tupleobj)       # importing them is what defines these types

Kind = Any
"""A type of Numba's."""

Write = Callable[[ir.IRBuilder, Any], Any]
"""Writes an operation on values; the value of the result."""


class Machine(CPUContext):  # type: ignore[misc]
    """How types and calls become LLVM IR."""

    def load_additional_registries(self) -> None:
        pass

    def add_linking_libs(self, libraries: Any) -> None:
        """No operation is a call of another module."""


class Typing(BaseContext):  # type: ignore[misc]
    """What types the results of calls have."""

    def install_registry(self, registry: Any) -> None:
        """Take over all declarations but overloads written in Python, which are for other types."""
        loader = self._registries.setdefault(registry, RegistryLoader(registry))
        for template in filter(_is_plain, loader.new_registrations("functions")):
            self.insert_function(template(self))
        for template in filter(_is_plain, loader.new_registrations("attributes")):
            self.insert_attributes(template(self))
        for value, kind in loader.new_registrations("globals"):
            if isinstance(kind, types.Function) and not all(map(_is_plain, kind.templates)):
                continue
            known = self._lookup_global(value)
            if known is not None:
                self._remove_global(value)
                kind = known.augment(kind)
            self.insert_global(value, kind)

    def kind_of_function(self, value: Any) -> Kind:
        """The type of a function. Numba asks first what else it may be, and imports a lot to know."""
        return self._lookup_global(value) or self.resolve_value_type(value)


def _is_plain(template: type) -> bool:
    return not issubclass(template, _TemplateTargetHelperMixin)


def _machine() -> Machine:
    """A division of integers by zero gives zero, and one of floats what the processor gives."""
    machine = Machine(TYPING, "cpu")
    return machine.subtarget(error_model=create_error_model("numpy", machine))


TYPING: Any = Typing()
MACHINE: Any = _machine()


class Operation(NamedTuple):
    """An operator or a call for certain types: those that it takes, that of its result, and what writes it."""

    takes: tuple[Kind, ...]
    result: Kind
    write: Write


_operations: dict[tuple[Any, tuple[Kind, ...]], Operation] = {}


def refresh() -> None:
    """Take over what was taught since the last time."""
    TYPING.refresh()
    MACHINE.refresh()


def operation(function: Any, arguments: tuple[Kind, ...]) -> Operation:
    """What `function`, of Python's ``operator`` or of the vocabulary, is for these types; looked up once in a process.
    TypeError where it is nothing."""
    key = function, arguments
    if key not in _operations:
        kind = kind_of_global(function)
        signature = TYPING.resolve_function_type(kind, arguments, {})
        if signature is None:
            raise TypeError(f"{function.__name__} does not take {', '.join(map(str, arguments))}")
        _operations[key] = _of_constant(function, arguments, signature.return_type) or Operation(
            signature.args, signature.return_type, MACHINE.get_function(kind, signature))
    return _operations[key]


def _of_constant(function: Any, arguments: tuple[Kind, ...], result: Kind) -> Operation | None:
    """Quotient or rest of a signed integer and a positive constant: nothing can go wrong, and few instructions do it."""
    if function not in (operator.floordiv, operator.mod) or not isinstance(arguments[1], types.IntegerLiteral):
        return None
    divisor = arguments[1].literal_value
    if divisor <= 0 or not (isinstance(result, types.Integer) and result.signed):
        return None
    is_power, is_rest = divisor & (divisor - 1) == 0, function is operator.mod

    def write(builder: ir.IRBuilder, values: Any) -> ir.Value:
        x, number = values[0], values[0].type
        if is_power:
            return builder.and_(x, number(divisor - 1)) if is_rest else builder.ashr(x, number(divisor.bit_length() - 1))
        rest = builder.srem(x, number(divisor))
        is_below = builder.icmp_signed("<", rest, number(0))
        if is_rest:
            return builder.select(is_below, builder.add(rest, number(divisor)), rest)
        return builder.sub(builder.sdiv(x, number(divisor)), builder.zext(is_below, number))

    return Operation((result, arguments[1]), result, write)


def kind_of_global(value: Any) -> Kind:
    """The type of a constant, or of a function."""
    if isinstance(value, int) and not isinstance(value, bool):
        return types.literal(value)
    return _kind_of_function(value) if callable(value) else TYPING.resolve_value_type(value)


@cache
def _kind_of_function(value: Any) -> Kind:
    return TYPING.kind_of_function(value)


def unify(kinds: list[Kind]) -> Kind:
    """The type that values of all `kinds` can have."""
    first = kinds[0]
    for kind in kinds[1:]:
        found = first if kind is first else TYPING.unify_pairs(first, kind)
        if found is None:
            raise TypeError(f"one value is {first} and {kind}")
        first = found
    return first


def convert(builder: ir.IRBuilder, value: ir.Value, kind: Kind, wanted: Kind) -> ir.Value:
    """`value`, of type `kind`, as `wanted`. Where a literal or a function is wanted nothing reads the value."""
    if kind is wanted or isinstance(wanted, types.Literal | types.Function | types.NumberClass):
        return value
    plain = types.unliteral(kind)
    return value if plain == wanted else MACHINE.cast(builder, value, plain, wanted)
