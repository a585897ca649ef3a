"""What a primitive's record is. The records themselves are in `jitgrad.ops`, one file per family.

A record holds every fact that any part of jitgrad needs about an op; no pass keeps a list of op names. Its gradient
rules say what they read *by the names of their parameters*, so nothing is saved that no rule asks for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jitgrad.ir.interpreter import state
from jitgrad.ir.types import TensorType

Infer = Callable[..., "TensorType | tuple[TensorType, ...]"]

KINDS = ("elementwise", "source", "movement", "reduction", "scan", "contraction", "window", "index", "sort", "foreach",
         "region")
EFFECTS = ("random", "host", "print", "collective", "may-fail")


@dataclass(frozen=True, slots=True)
class Rule:
    """A gradient rule and where each of its parameters comes from.

    Parameters are found by name: ``g`` (or ``g0``, ``g1`` … for ops with several outputs) is the incoming gradient,
    ``out`` (``out0`` …) an output, an operand's name that operand, ``<operand>_type`` its type only, an attribute's
    name that attribute."""

    function: Callable[..., Any]
    sources: tuple[tuple[str, Any], ...]

    @property
    def reads_inputs(self) -> frozenset[int]:
        return frozenset(k for kind, k in self.sources if kind == "input")

    @property
    def reads_outputs(self) -> frozenset[int]:
        return frozenset(k for kind, k in self.sources if kind == "output")


@dataclass(eq=False, slots=True)
class Op:
    """One primitive.

    infer(*types, **attrs)   the result type(s); raises ShapeError/DTypeError; never broadcasts or promotes
    eager(*arrays, **attrs)  the NumPy reference
    vjp                      one rule per operand (None: not differentiable in it); for variadic ops one rule that
                             returns a tuple with an entry per operand
    spell                    how a kernel writes it: a template (``"{0} + {1}"``, with attributes by their names) or the
                             name of a function that every target's math module defines; None: no scalar form
    """

    name: str
    operands: tuple[str, ...]
    infer: Infer
    eager: Callable[..., Any]
    kind: str
    vjp: Any = None
    spell: str | None = None
    outputs: int = 1
    variadic: bool = False
    commutative: bool = False
    view: bool = False                      # eager results may share memory with the (only) operand
    alias: bool = False                     # in a plan the result is the first operand's memory as it is: no kernel
    effects: frozenset[str] = frozenset()
    identity: float | int | None = None     # reductions: value of an empty reduction; None: it is an error
    unread: frozenset[int] = frozenset()    # operands of which the result reads nothing but the type
    exact: bool = False                     # rounded correctly: the same to the last bit, whoever carries it out
    epilogue: str = ""                      # the template of kernels that go on with elementwise ops of its result
    doc: str = ""
    rules: tuple[Rule | None, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: kind {self.kind!r} is not one of {', '.join(KINDS)}")
        unknown = self.effects - set(EFFECTS)
        if unknown:
            raise ValueError(f"{self.name}: unknown effects {sorted(unknown)}")
        written = self.vjp if isinstance(self.vjp, tuple) else (self.vjp,)
        self.rules = tuple(None if f is None else self._read_signature(f) for f in written)
        if not self.variadic and self.vjp is not None and len(self.rules) != len(self.operands):
            raise ValueError(f"{self.name}: {len(self.rules)} gradient rules for {len(self.operands)} operands")

    def _read_signature(self, function: Callable[..., Any]) -> Rule:
        sources: list[tuple[str, Any]] = []
        for name in inspect.signature(function).parameters:
            if self.variadic and name == self.operands[0]:
                sources.append(("inputs", None))
            elif self.variadic and name == self.operands[0] + "_types":
                sources.append(("types", None))
            elif name in self.operands:
                sources.append(("input", self.operands.index(name)))
            elif name.endswith("_type") and name[:-5] in self.operands:
                sources.append(("type", self.operands.index(name[:-5])))
            elif name in ("g", "out"):
                sources.append(("gradient" if name == "g" else "output", 0))
            elif name[:-1] in ("g", "out") and name[-1].isdigit():
                sources.append(("gradient" if name[0] == "g" else "output", int(name[-1])))
            elif name == "gs":
                sources.append(("gradients", None))
            elif name == "outs":
                sources.append(("outputs", None))
            else:
                sources.append(("attr", name))
        return Rule(function, tuple(sources))

    @property
    def differentiable(self) -> bool:
        return any(rule is not None for rule in self.rules)

    def result_types(self, types: tuple[TensorType, ...], attrs: Mapping[str, Any]) -> tuple[TensorType, ...]:
        """The types of all outputs, always as a tuple."""
        result = self.infer(*types, **attrs)
        return result if isinstance(result, tuple) else (result,)

    def __call__(self, *inputs: Any, **attrs: Any) -> Any:
        return state.current.run(self, inputs, attrs)  # type: ignore[union-attr]

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __reduce__(self) -> Any:
        return _lookup, (self.name,)


REGISTRY: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Enter a record under its name; a second record of the same name is an error."""
    if op.name in REGISTRY:
        raise ValueError(f"op {op.name} is defined twice")
    REGISTRY[op.name] = op
    return op


def _lookup(name: str) -> Op:
    return REGISTRY[name]
