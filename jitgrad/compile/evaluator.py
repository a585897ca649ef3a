"""What the parts of the abstract evaluation share: what was found out, and how objects are reached."""

from __future__ import annotations

import ast
import types
from dataclasses import dataclass, field
from typing import Any

from jitgrad.amp.scaler import GradScaler
from jitgrad.compile.values import SIMPLE, Impure, Known, Path, Scope, Several
from jitgrad.nn.module import Module
from jitgrad.optim.optimizer import Optimizer
from jitgrad.tensor import Tensor

TRUSTED_MODULES = ("jitgrad.functional", "jitgrad.ops", "jitgrad.autograd", "jitgrad.func", "jitgrad.nn", "jitgrad.optim",
                   "jitgrad.tensor", "jitgrad.creation", "jitgrad.making", "jitgrad.random", "jitgrad.compile",
                   "jitgrad.dtypes", "jitgrad.utils", "jitgrad.amp")


@dataclass(slots=True)
class Findings:
    """What the analysis of a function found out."""

    guards: dict[tuple[Any, ...], tuple[Path, Any]] = field(default_factory=dict)
    modules: dict[int, Module] = field(default_factory=dict)
    optimizers: dict[int, Optimizer] = field(default_factory=dict)
    scalers: dict[int, GradScaler] = field(default_factory=dict)
    tensors: dict[int, Path] = field(default_factory=dict)      # known Tensors outside of modules: where they are found

    def same_as(self, other: Findings) -> bool:
        """True when another look at the function gave the same."""
        return self.modules.keys() == other.modules.keys() and self.optimizers.keys() == other.optimizers.keys() \
            and self.scalers.keys() == other.scalers.keys() \
            and {k: p.identity for k, p in self.tensors.items()} == {k: p.identity for k, p in other.tensors.items()} \
            and self.guards.keys() == other.guards.keys() \
            and all(_same_guard(g, other.guards[k]) for k, g in self.guards.items())


def _same_guard(one: tuple[Path, Any], other: tuple[Path, Any]) -> bool:
    (value, content), (other_value, other_content) = one[1], other[1]
    if value is not other_value and not (isinstance(value, SIMPLE) and type(value) is type(other_value)
                                         and value == other_value):
        return False
    return type(content) is not tuple or content == other_content


class Evaluator:
    """State and the notes about what is reached; `statements`, `expressions` and `analysis` add the rest."""

    def __init__(self) -> None:
        self.findings = Findings()
        self.where: tuple[str, int] | None = None
        self.running: set[Any] = set()
        self.finished: dict[Any, Any] = {}
        self.trusted = False

    def refuse(self, why: str) -> Impure:
        return Impure(why, self.where)

    # --- what is reached, and which guards that needs ----------------------------------------------------------------

    def reach(self, known: Known) -> Known:
        """Note that the function depends on this object being where it is."""
        value, path = known.value, known.path
        if isinstance(value, Module):
            self._reach_module(value)
        elif isinstance(value, Optimizer):
            self.findings.optimizers.setdefault(id(value), value)
        elif isinstance(value, GradScaler):
            self.findings.scalers.setdefault(id(value), value)
        elif isinstance(value, Tensor) and path is not None:
            if not self._protected(path) and not path.is_leaf:
                self.findings.tensors.setdefault(id(value), path)
            return known
        if path is None or (path.root[0] == "argument" and not path.steps) or self._trusted(path):
            return known
        expected = tuple(map(id, value)) if type(value) in (list, tuple, set) else \
            tuple((k, id(v)) for k, v in value.items()) if type(value) is dict else value
        self.findings.guards.setdefault(path.identity, (path, (value, expected)))
        return known

    def test(self, node: Any, scope: Scope) -> None:
        """A condition: what it depends on is noted, both ways are followed."""
        self.touch(self.expression(node, scope))

    def touch(self, value: Any) -> Any:
        """`reach` for whatever is known in an abstract value, which is returned."""
        if type(value) is Known:
            self.reach(value)
        elif type(value) is tuple or type(value) is Several:
            for v in value.options if isinstance(value, Several) else value:
                self.touch(v)
        return value

    def _reach_module(self, module: Module) -> None:
        if id(module) in self.findings.modules:
            return
        self.findings.modules[id(module)] = module
        for child in module.children():
            self._reach_module(child)

    def _trusted(self, path: Path) -> bool:
        """True for what lies behind a Python module that nobody changes: ``jg.nn.functional.relu``, ``math.pi``."""
        if not path.steps or path.root[0] != "global":
            return False
        value = Path(path.root).fetch({})
        for step, key in path.steps[:-1]:
            value = getattr(value, key) if step == "attr" else value[key]
        return isinstance(value, types.ModuleType) and value.__name__.split(".")[0] in ("jitgrad", "math", "functools",
                                                                                        "operator", "itertools")

    def _protected(self, path: Path) -> bool:
        """True for a direct attribute of a Module, whose changes are counted."""
        if not path.steps or path.steps[-1][0] != "attr" or path.root[0] == "argument":
            return False
        try:
            owner = Path(path.root, path.steps[:-1]).fetch({})
        except Exception:
            return False
        return isinstance(owner, Module)

    # --- given by the other parts ------------------------------------------------------------------------------------

    def expression(self, node: Any, scope: Scope) -> Any:
        """The abstract value of an expression."""
        raise NotImplementedError

    def block(self, statements: list[ast.stmt], scope: Scope) -> None:
        """Carry out statements."""
        raise NotImplementedError

    def assign(self, target: Any, value: Any, scope: Scope, augmented: bool = False) -> None:
        """Store into a target."""
        raise NotImplementedError

    def call(self, callee: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The abstract result of a call."""
        raise NotImplementedError

    def functions_among(self, args: list[Any], kwargs: dict[str, Any]) -> None:
        """User functions that are handed to trusted code will be called by it."""
        raise NotImplementedError

    def elements(self, value: Any) -> Any:
        """The abstract element of an iteration over `value`."""
        raise NotImplementedError

    def item(self, owner: Known, key: Any) -> Any:
        """``owner[key]`` of a known container."""
        raise NotImplementedError

    def attribute(self, owner: Any, name: str) -> Any:
        """``owner.name``"""
        raise NotImplementedError

    def arithmetic(self, operands: list[Any]) -> Any:
        """The result of an operator."""
        raise NotImplementedError


def is_trusted_code(value: Any) -> bool:
    """True for functions and classes of ours that have no effects beyond Tensors, Modules and optimizers."""
    module = getattr(value, "__module__", None) or ""
    if getattr(value, "__name__", "") in ("print", "save", "load", "compare", "verify", "manual_seed", "seed") or \
            getattr(value, "__name__", "").startswith(("set_autocast", "set_float32_matmul")):
        return False
    if isinstance(value, types.FunctionType | type) or hasattr(value, "vjp"):
        return module.startswith(TRUSTED_MODULES) or type(value).__module__ == "jitgrad.ir.op"
    return type(value).__module__.startswith(("jitgrad.ir.op", "jitgrad.autograd"))


def word_for(node: ast.AST) -> str:
    return type(node).__name__.lower()
