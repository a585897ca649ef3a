"""Looking at the source of a user's function: may its body be skipped when the guards hold?

The functions that a call can reach are read as syntax trees and evaluated abstractly. A value is `Known` (an object that
exists, with the path on which the function gets to it), `FRESH` (made by this call: Tensors, numbers, containers of
them), `READ` (a number that was read out of a Tensor) or `OPAQUE` (anything else). What is allowed: ops, pure built-in
functions, branches and loops over known things, user functions and Modules that are allowed themselves, and stores into
local names, Tensors, ``.grad`` and attributes of Modules. Everything else raises `Impure` with the line and the reason,
and the function stays replayed. In doubt it is impure.

What comes out is the list of guards that the calls to come have to check, and the objects that were reached.
"""

from __future__ import annotations

import ast
import builtins
import linecache
import operator
import types
from dataclasses import dataclass, field
from typing import Any

from jitgrad.dtypes import DType
from jitgrad.errors import describe_location
from jitgrad.ir.types import TensorType
from jitgrad.nn.module import Module
from jitgrad.optim.optimizer import Optimizer
from jitgrad.tensor import Tensor


class Impure(Exception):
    """Why a function must be replayed."""

    def __init__(self, why: str, where: tuple[str, int] | None):
        super().__init__(f"{describe_location(where)}: {why}" if where else why)
        self.where = where


@dataclass(frozen=True, slots=True)
class Path:
    """How the function gets to an object: from a root (a dict of globals, a closure cell, an argument) by steps."""

    root: tuple[str, Any, Any]                  # ("global", dict, name) ("cell", cell, name) ("argument", None, k)
    steps: tuple[tuple[str, Any], ...] = ()     # ("attr", name) ("item", key)

    def then(self, kind: str, key: Any) -> Path:
        return Path(self.root, (*self.steps, (kind, key)))

    def fetch(self, arguments: Any) -> Any:
        """The object that is there now; KeyError, AttributeError … when there is none."""
        kind, place, name = self.root
        if kind == "global":
            found = place[name] if name in place else getattr(builtins, name)
        elif kind == "cell":
            found = place.cell_contents
        else:
            found = arguments[name]
        for step, key in self.steps:
            found = getattr(found, key) if step == "attr" else found[key]
        return found

    @property
    def identity(self) -> tuple[Any, ...]:
        kind, place, name = self.root
        return kind, id(place), name, self.steps

    def __str__(self) -> str:
        text = str(self.root[2])
        for step, key in self.steps:
            text += f".{key}" if step == "attr" else f"[{key!r}]"
        return text


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """An object that exists. `path` is None for literals and for what is reached through trusted code only."""

    value: Any
    path: Path | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Several:
    """One of several known objects: the variable of a loop over a known container."""

    options: tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Local:
    """A function defined inside of the analyzed one."""

    node: Any
    scope: Any


class _Kind:
    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


FRESH, READ, OPAQUE = _Kind("FRESH"), _Kind("READ"), _Kind("OPAQUE")

SIMPLE = (bool, int, float, complex, str, bytes, type(None), DType, TensorType, type(Ellipsis), slice, range)
TRUSTED_MODULES = ("jitgrad.functional", "jitgrad.ops", "jitgrad.autograd", "jitgrad.func", "jitgrad.nn", "jitgrad.optim",
                   "jitgrad.tensor", "jitgrad.creation", "jitgrad.random", "jitgrad.compile", "jitgrad.dtypes",
                   "jitgrad.utils", "jitgrad.amp")
HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
PURE_BUILTINS = frozenset((abs, all, any, bool, complex, dict, divmod, enumerate, float, frozenset, getattr, hasattr, int,
                           isinstance, issubclass, len, list, max, min, pow, range, reversed, round, set, slice, sorted,
                           str, sum, tuple, type, zip, callable))
READING_BUILTINS = frozenset((float, int, bool, complex))
PURE_METHODS = {dict: ("get", "keys", "values", "items", "copy"), list: ("index", "count", "copy"),
                tuple: ("index", "count"), str: ("format", "join", "startswith", "endswith", "split", "strip", "upper",
                                                 "lower", "replace", "find"), set: ("copy",), frozenset: ()}
FRESH_METHODS = frozenset(("append", "extend", "insert", "pop", "items", "keys", "values", "get", "update", "setdefault",
                           "copy", "index", "count", "reverse", "sort", "add", "format", "join", "startswith",
                           "endswith", "_replace", "_asdict", "save_for_backward"))
READING_METHODS = frozenset(("item", "tolist", "numpy", "__array__"))
IMPURE_TENSOR_METHODS = frozenset(("numpy", "tolist", "data_ptr", "register_hook", "retain_grad", "__dlpack__", "share_memory_"))


@dataclass(slots=True)
class Findings:
    """What the analysis of a function found out."""

    guards: dict[tuple[Any, ...], tuple[Path, Any]] = field(default_factory=dict)
    modules: dict[int, Module] = field(default_factory=dict)
    optimizers: dict[int, Optimizer] = field(default_factory=dict)
    tensors: dict[int, Path] = field(default_factory=dict)      # known Tensors outside of modules: where they are found
    reads: tuple[bool, ...] = ()                                # per leaf of the result: a value read out of a Tensor


class _Scope:
    """The names of one function: locals, and how to find the others."""

    def __init__(self, function: types.FunctionType | None, parent: _Scope | None, names: dict[str, Any], file: str,
                 path: Path | None):
        self.function = function
        self.parent = parent
        self.names = names
        self.file = file
        self.path = path
        self.returned: list[Any] = []

    def lookup(self, name: str) -> Any:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            if scope.function is not None:
                return _free_variable(scope.function, name)
            scope = scope.parent
        raise KeyError(name)


def _free_variable(function: types.FunctionType, name: str) -> Known:
    code = function.__code__
    if name in code.co_freevars:
        cell = (function.__closure__ or ())[code.co_freevars.index(name)]
        return Known(cell.cell_contents, Path(("cell", cell, name)))
    if name in function.__globals__:
        return Known(function.__globals__[name], Path(("global", function.__globals__, name)))
    return Known(getattr(builtins, name), Path(("global", function.__globals__, name)))


def analyze(function: Any, arguments: dict[Any, Any], trusted: bool = False) -> Findings:
    """Findings about a call of `function` with `arguments` (by position or name); `Impure` when it must be replayed.
    With `trusted` the user vouches for it: what cannot be seen through is taken to be free of effects."""
    analysis = _Analysis()
    analysis.trusted = trusted
    known = {k: Known(v, Path(("argument", None, k))) for k, v in arguments.items()}
    positional = [known[k] for k in sorted(k for k in known if isinstance(k, int))]
    named = {k: v for k, v in known.items() if isinstance(k, str)}
    analysis.where = None
    result = analysis.call(Known(function), positional, named)
    analysis.findings.reads = tuple(_read_leaves(result))
    return analysis.findings


def _read_leaves(value: Any) -> list[bool]:
    """For each leaf of an abstract result whether it is a value that was read."""
    if type(value) is tuple:
        return [leaf for v in value for leaf in _read_leaves(v)]
    return [value is READ]


class _Analysis:
    """Abstract evaluation. Methods ``x_Name`` evaluate expressions, ``s_Name`` carry out statements."""

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
        elif isinstance(value, Tensor) and path is not None:
            if not self._protected(path):
                self.findings.tensors.setdefault(id(value), path)
            return known
        if path is None or path.root[0] == "argument" and not path.steps or self._trusted(path):
            return known
        expected = tuple(map(id, value)) if type(value) in (list, tuple, set) else \
            tuple((k, id(v)) for k, v in value.items()) if type(value) is dict else value
        self.findings.guards.setdefault(path.identity, (path, (value, expected)))
        return known

    def touch(self, value: Any) -> Any:
        """`reach` for whatever is known in an abstract value, which is returned."""
        if type(value) is Known:
            self.reach(value)
        elif type(value) is tuple or type(value) is Several:
            for v in value if type(value) is tuple else value.options:
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

    # --- calls -------------------------------------------------------------------------------------------------------

    def call(self, callee: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The abstract result of a call."""
        if type(callee) is Several:
            return _join([self.call(c, args, kwargs) for c in callee.options])
        if type(callee) is Local:
            return self._call_local(callee, args, kwargs)
        if callee is FRESH:
            self._functions_among(args, kwargs)
            return FRESH
        if type(callee) is not Known:
            raise self.refuse("calls something that is not known before the call")
        value = callee.value
        self.reach(callee)
        if isinstance(value, Module):
            return self._call_module(value, callee, args, kwargs)
        inner = getattr(value, "function", None) if type(value).__name__ == "CompiledFunction" else None
        if inner is not None:
            return self.call(Known(inner), args, kwargs)
        if isinstance(value, types.MethodType):
            return self.call(Known(value.__func__), [Known(value.__self__, _self_path(callee)), *args], kwargs)
        if self._is_trusted_code(value):
            self._functions_among(args, kwargs)
            return FRESH
        if isinstance(value, types.FunctionType):
            return self._call_function(value, callee, args, kwargs)
        if _hashable(value) and value in PURE_BUILTINS:
            return self._call_builtin(value, args, kwargs)
        if getattr(value, "__module__", None) in ("math", "operator", "_operator") and value is not operator.setitem:
            return FRESH
        if isinstance(value, type) and issubclass(value, BaseException):
            return OPAQUE
        raise self.refuse(f"calls {getattr(value, '__qualname__', value)!s}, which is not known to be free of effects")

    def _is_trusted_code(self, value: Any) -> bool:
        module = getattr(value, "__module__", None) or ""
        if getattr(value, "__name__", "") in ("print", "save", "load", "compare", "verify", "manual_seed", "seed"):
            return False
        if isinstance(value, types.FunctionType | type) or hasattr(value, "vjp"):
            return module.startswith(TRUSTED_MODULES) or type(value).__module__ == "jitgrad.ir.op"
        return type(value).__module__.startswith(("jitgrad.ir.op", "jitgrad.autograd"))

    def _functions_among(self, args: list[Any], kwargs: dict[str, Any]) -> None:
        """User functions that are handed to trusted code will be called by it."""
        for a in [*args, *kwargs.values()]:
            if type(a) is Local:
                self.call(a, [FRESH] * len(a.node.args.args), {})
            elif type(a) is Known and isinstance(a.value, types.FunctionType) and not self._is_trusted_code(a.value):
                self.call(a, [FRESH] * a.value.__code__.co_argcount, {})
            elif type(a) is Known and isinstance(a.value, Module):
                self.call(a, [FRESH], {})
            else:
                self.touch(a)

    def _call_module(self, module: Module, callee: Known, args: list[Any], kwargs: dict[str, Any]) -> Any:
        forward = type(module).forward
        for child in module.modules():
            if any(child.__dict__[table].entries for table in HOOK_TABLES):
                raise self.refuse(f"{type(child).__name__} has hooks")
        if not self._is_trusted_code(forward):
            return self._call_function(forward, Known(forward), [callee, *args], kwargs)
        for child in module.modules():                # a layer of ours that may call the user's layers
            if child is not module and not self._is_trusted_code(type(child).forward):
                count = type(child).forward.__code__.co_argcount - 1
                self._call_function(type(child).forward, Known(forward), [Known(child), *[FRESH] * count], {})
        return FRESH

    def _call_builtin(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        for a in args:
            if type(a) is Known:
                self.reach(a)
        if function in READING_BUILTINS and args and args[0] is FRESH:
            return READ
        if function is len and args and type(args[0]) is Known and isinstance(args[0].value, SIMPLE + (list, tuple, dict)):
            return Known(len(args[0].value))
        if function is getattr and len(args) >= 2 and type(args[1]) is Known:
            return self.attribute(args[0], args[1].value)
        if function in (enumerate, zip, reversed, list, tuple, sorted) and not kwargs:
            return self._iterator(function, args)
        return FRESH if all(_harmless(a) for a in args) else OPAQUE

    def _iterator(self, function: Any, args: list[Any]) -> Any:
        elements = [self.elements(a) for a in args]
        if function is enumerate:
            return Several(((FRESH, _join(elements)),))
        if function is zip:
            return Several((tuple(_join([e]) for e in elements),))
        return Several((elements[0],)) if elements else FRESH

    def _call_function(self, function: types.FunctionType, callee: Known, args: list[Any], kwargs: dict[str, Any]) -> Any:
        node, file = function_syntax(function)
        if node is None:
            raise self.refuse(f"the source of {function.__qualname__} is not at hand")
        key = function.__code__, tuple([_signature(a) for a in args]), tuple((k, _signature(v)) for k, v in kwargs.items())
        if key in self.finished:
            return self.finished[key]
        if key in self.running or len(self.running) > 100:
            raise self.refuse(f"{function.__qualname__} calls itself")
        defaults = dict(zip(reversed([a.arg for a in node.args.posonlyargs + node.args.args]),
                            [Known(d) for d in reversed(function.__defaults__ or ())]))
        defaults.update({k: Known(d) for k, d in (function.__kwdefaults__ or {}).items()})
        names = self._bind(node.args, args, kwargs, defaults)
        scope = _Scope(function, None, names, file, callee.path)
        self.running.add(key)
        outer = self.where
        try:
            result = self.body_of(node, scope)
        finally:
            self.running.discard(key)
        self.where = outer
        self.finished[key] = result
        return result

    def _call_local(self, local: Local, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if local.node in self.running:
            raise self.refuse("a local function calls itself")
        names = self._bind(local.node.args, args, kwargs, {a.arg: FRESH for a in local.node.args.args})
        self.running.add(local.node)
        result = self.body_of(local.node, _Scope(None, local.scope, names, local.scope.file, None))
        self.running.discard(local.node)
        return result

    def _bind(self, spec: ast.arguments, args: list[Any], kwargs: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        parameters = [a.arg for a in spec.posonlyargs + spec.args]
        names = {**defaults, **dict(zip(parameters, args))}
        if spec.vararg:
            names[spec.vararg.arg] = tuple(args[len(parameters):])
        keywords = set(parameters) | {a.arg for a in spec.kwonlyargs}
        names.update({k: v for k, v in kwargs.items() if k in keywords})
        if spec.kwarg:
            rest = [v for k, v in kwargs.items() if k not in keywords]
            names[spec.kwarg.arg] = FRESH if all(_harmless(v) for v in rest) else OPAQUE
        for a in spec.posonlyargs + spec.args + spec.kwonlyargs:
            names.setdefault(a.arg, FRESH)
        return names

    def body_of(self, node: Any, scope: _Scope) -> Any:
        if isinstance(node, ast.Lambda):
            return self.expression(node.body, scope)
        self.block(node.body, scope)
        return _join(scope.returned) if scope.returned else Known(None)

    # --- statements --------------------------------------------------------------------------------------------------

    def block(self, statements: list[ast.stmt], scope: _Scope) -> None:
        for statement in statements:
            self.where = scope.file, statement.lineno
            method = getattr(self, "s_" + type(statement).__name__, None)
            if method is None:
                raise self.refuse(f"has a {_word(statement)} statement")
            method(statement, scope)

    def s_Pass(self, node: ast.Pass, scope: _Scope) -> None:
        """Nothing."""

    s_Break = s_Continue = s_Pass

    def s_Raise(self, node: ast.Raise, scope: _Scope) -> None:
        """Not reached while the guards hold: the call that was recorded did not reach it."""

    def s_Expr(self, node: ast.Expr, scope: _Scope) -> None:
        self.expression(node.value, scope)

    def s_Return(self, node: ast.Return, scope: _Scope) -> None:
        scope.returned.append(Known(None) if node.value is None else self.touch(self.expression(node.value, scope)))

    def s_Assert(self, node: ast.Assert, scope: _Scope) -> None:
        self.test(node.test, scope)

    def s_Assign(self, node: ast.Assign, scope: _Scope) -> None:
        value = self.expression(node.value, scope)
        for target in node.targets:
            self.assign(target, value, scope)

    def s_AnnAssign(self, node: ast.AnnAssign, scope: _Scope) -> None:
        if node.value is not None:
            self.assign(node.target, self.expression(node.value, scope), scope)

    def s_AugAssign(self, node: ast.AugAssign, scope: _Scope) -> None:
        value = self.expression(node.value, scope)
        if isinstance(node.target, ast.Name):
            old = self.expression(ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target), scope)
            if type(old) is Known and not isinstance(old.value, (*SIMPLE, tuple, Tensor)):
                raise self.refuse(f"changes {node.target.id} in place")
            self.assign(node.target, self._arithmetic([old, value]), scope)
        else:
            self.assign(node.target, FRESH, scope, augmented=True)

    def s_If(self, node: ast.If, scope: _Scope) -> None:
        self.test(node.test, scope)
        before = dict(scope.names)
        self.block(node.body, scope)
        taken, scope.names = scope.names, before
        self.block(node.orelse, scope)
        scope.names = _merge(taken, scope.names)

    def s_While(self, node: ast.While, scope: _Scope) -> None:
        for _ in range(2):
            before = dict(scope.names)
            self.test(node.test, scope)
            self.block(node.body, scope)
            scope.names = _merge(before, scope.names)
        self.block(node.orelse, scope)

    def s_For(self, node: ast.For, scope: _Scope) -> None:
        element = self.elements(self.expression(node.iter, scope))
        for _ in range(2):                            # twice: what the first pass assigns is seen by the second
            before = dict(scope.names)
            self.assign(node.target, element, scope)
            self.block(node.body, scope)
            scope.names = _merge(before, scope.names)
        self.block(node.orelse, scope)

    def s_With(self, node: ast.With, scope: _Scope) -> None:
        for item in node.items:
            context = self.expression(item.context_expr, scope)
            if context is not FRESH:
                raise self.refuse("enters a context that is not jitgrad's")
            if item.optional_vars is not None:
                self.assign(item.optional_vars, FRESH, scope)
        self.block(node.body, scope)

    def s_FunctionDef(self, node: ast.FunctionDef, scope: _Scope) -> None:
        if node.decorator_list:
            raise self.refuse("defines a decorated function")
        scope.names[node.name] = Local(node, scope)

    def s_Delete(self, node: ast.Delete, scope: _Scope) -> None:
        for target in node.targets:
            if not isinstance(target, ast.Name) or target.id not in scope.names:
                raise self.refuse("deletes something that is not a local name")

    def test(self, node: ast.expr, scope: _Scope) -> None:
        self.touch(self.expression(node, scope))

    def assign(self, target: Any, value: Any, scope: _Scope, augmented: bool = False) -> None:
        """Store into a target: allowed for local names, Tensors, and attributes of Modules and Tensors."""
        if isinstance(target, ast.Name):
            code = scope.function.__code__ if scope.function else None
            if code is not None and target.id not in code.co_varnames + code.co_cellvars:
                raise self.refuse(f"assigns the global or outer name {target.id}")
            scope.names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            parts = value if type(value) is tuple and len(value) == len(target.elts) else None
            if type(value) is Known and type(value.value) in (list, tuple) and len(value.value) == len(target.elts):
                self.reach(value)
                parts = tuple(self.item(value, k) for k in range(len(value.value)))
            for k, t in enumerate(target.elts):
                t = t.value if isinstance(t, ast.Starred) else t
                self.assign(t, parts[k] if parts else self.elements(value), scope)
        elif isinstance(target, ast.Attribute):
            self._assign_attribute(self.expression(target.value, scope), target.attr, value, augmented)
        elif isinstance(target, ast.Subscript):
            owner = self.expression(target.value, scope)
            self.expression(target.slice, scope)
            options = owner.options if type(owner) is Several else (owner,)
            if not all(o is FRESH or (type(o) is Known and isinstance(o.value, Tensor)) for o in options):
                raise self.refuse("stores into a container from outside")
        else:
            raise self.refuse("stores into something unusual")

    def _assign_attribute(self, owner: Any, name: str, value: Any, augmented: bool) -> None:
        for o in owner.options if type(owner) is Several else (owner,):
            if o is FRESH and name in ("grad", "requires_grad", "data"):
                continue
            if type(o) is Known and isinstance(o.value, Tensor) and name == "grad":
                continue
            if type(o) is Known and isinstance(o.value, Module) and value is FRESH \
                    and isinstance(getattr(o.value, name, None), Tensor):
                self.reach(o)
                continue
            raise self.refuse(f"changes the attribute {name} of something that outlives the call")

    # --- expressions -------------------------------------------------------------------------------------------------

    def expression(self, node: Any, scope: _Scope) -> Any:
        method = getattr(self, "x_" + type(node).__name__, None)
        if method is None:
            raise self.refuse(f"has a {_word(node)} expression")
        return method(node, scope)

    def x_Constant(self, node: ast.Constant, scope: _Scope) -> Any:
        return Known(node.value)

    def x_Name(self, node: ast.Name, scope: _Scope) -> Any:
        try:
            found = scope.lookup(node.id)
        except (KeyError, AttributeError, ValueError):
            return OPAQUE                             # unbound on this path; Python would raise
        if type(found) is Known and isinstance(found.value, SIMPLE):
            self.reach(found)
        return found

    def x_Attribute(self, node: ast.Attribute, scope: _Scope) -> Any:
        return self.attribute(self.expression(node.value, scope), node.attr)

    def attribute(self, owner: Any, name: str) -> Any:
        """``owner.name``"""
        if type(owner) is Several:
            return Several(tuple(self.attribute(o, name) for o in owner.options))
        if owner is FRESH:
            return FRESH
        if type(owner) is not Known:
            raise self.refuse(f"reads the attribute {name} of something unknown")
        value = owner.value
        if isinstance(value, Tensor):
            self.reach(owner)
            return FRESH if name != "grad" else owner
        described = getattr(type(value), name, None)
        if isinstance(described, property) and not self._is_trusted_code(described.fget):
            return self.call(Known(described.fget), [owner], {})
        try:
            found = getattr(value, name)
        except AttributeError:
            return OPAQUE
        self.reach(Known(value, owner.path)) if not isinstance(value, types.ModuleType) else None
        path = owner.path.then("attr", name) if owner.path is not None else None
        if path is None and not isinstance(value, (Module, Optimizer, type, types.FunctionType)):
            return OPAQUE if not isinstance(found, SIMPLE) else Known(found)
        result = Known(found, None if isinstance(found, types.MethodType) else path)
        if isinstance(found, SIMPLE) and not isinstance(value, Module):
            self.reach(result)
        return result

    def x_Call(self, node: ast.Call, scope: _Scope) -> Any:
        args = []
        for a in node.args:
            if isinstance(a, ast.Starred):
                spread = self.expression(a.value, scope)
                args.extend(spread if type(spread) is tuple else [self.elements(spread)])
            else:
                args.append(self.expression(a, scope))
        kwargs = {k.arg or f"**{i}": self.expression(k.value, scope) for i, k in enumerate(node.keywords)}
        self.where = scope.file, node.lineno
        if isinstance(node.func, ast.Attribute):
            return self._call_method(self.expression(node.func.value, scope), node.func.attr, args, kwargs)
        if isinstance(node.func, ast.Name) and node.func.id == "super" and not args:
            return scope.names.get("self", OPAQUE)
        return self.call(self.expression(node.func, scope), args, kwargs)

    def _call_method(self, owner: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if type(owner) is Several:
            return _join([self._call_method(o, name, args, kwargs) for o in owner.options])
        if owner is FRESH or owner is READ or type(owner) is tuple:
            return self._call_fresh(owner, name, args, kwargs)
        if type(owner) is not Known:
            raise self.refuse(f"calls {name}() of something that is not known before the call")
        value = owner.value
        if isinstance(value, Tensor):
            self.reach(owner)
            return self._call_fresh(FRESH, name, args, kwargs)
        for kind, methods in PURE_METHODS.items():
            if type(value) is kind:
                if name not in methods:
                    raise self.refuse(f"calls {name}() of a {kind.__name__} from outside")
                return self._pure_method(owner, name, args)
        if isinstance(value, SIMPLE):
            return FRESH
        return self.call(self.attribute(owner, name), args, kwargs)

    def _call_fresh(self, owner: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if name in IMPURE_TENSOR_METHODS:
            raise self.refuse(f"calls {name}(), which hands memory or values to Python")
        if name in READING_METHODS:
            return READ
        if not hasattr(Tensor, name) and name not in FRESH_METHODS:
            raise self.refuse(f"calls {name}(), which is not known to be free of effects")
        self._functions_among(args, kwargs)
        return FRESH

    def _pure_method(self, owner: Known, name: str, args: list[Any]) -> Any:
        self.reach(owner)
        if name == "get" and args and type(args[0]) is Known:
            return self.item(owner, args[0].value) if args[0].value in owner.value else (args[1] if len(args) > 1
                                                                                          else Known(None))
        if name in ("values", "items", "keys"):
            pairs = [(Known(k), self.item(owner, k)) for k in owner.value]
            return Several(tuple(((k, v) if name == "items" else v if name == "values" else k,) for k, v in pairs))
        return FRESH

    def x_Subscript(self, node: ast.Subscript, scope: _Scope) -> Any:
        owner = self.expression(node.value, scope)
        key = self.expression(node.slice, scope)
        if type(owner) is Several:
            self.touch(owner)
            tensors = all(o is FRESH or (type(o) is Known and isinstance(o.value, Tensor)) for o in owner.options)
            return FRESH if tensors else OPAQUE
        if type(owner) is tuple:
            return owner[key.value] if type(key) is Known and type(key.value) is int else _join(list(owner))
        if type(owner) is Known and not isinstance(owner.value, Tensor):
            self.reach(owner)
            if type(key) is Known:
                return self.item(owner, key.value)
            if type(owner.value) is dict:
                return _join([self.item(owner, k) for k in owner.value])
            return self.elements(owner)
        self.touch(owner)
        return owner if owner is OPAQUE else FRESH

    def item(self, owner: Known, key: Any) -> Any:
        """``owner[key]`` of a known container."""
        if isinstance(owner.value, Module):
            return Known(owner.value[key], None)
        if not isinstance(owner.value, (list, tuple, dict, str)):
            raise self.refuse(f"reads an item of a {type(owner.value).__name__}")
        try:
            found = owner.value[key]
        except Exception:
            return OPAQUE
        path = owner.path.then("item", key) if owner.path is not None else None
        return self.reach(Known(found, path))

    def elements(self, value: Any) -> Any:
        """The abstract element of an iteration over `value`."""
        if type(value) is Several:
            return _join([o[0] if type(o) is tuple and len(o) == 1 else o for o in value.options])
        if type(value) is tuple:
            return _join(list(value))
        if type(value) is Known:
            return self._known_elements(value)
        if value is OPAQUE:
            raise self.refuse("iterates over something that is not known before the call")
        return FRESH

    def _known_elements(self, known: Known) -> Any:
        value = known.value
        if isinstance(value, Tensor):
            self.reach(known)
            return FRESH
        if isinstance(value, Module):
            self.reach(known)
            return Several(tuple(Known(m) for m in value))
        if type(value) in (list, tuple):
            self.reach(known)
            return _join([self.item(known, k) for k in range(len(value))])
        if type(value) is dict:
            self.reach(known)
            return _join([Known(k) for k in value])
        if isinstance(value, (range, str)):
            return FRESH
        raise self.refuse(f"iterates over a {type(value).__name__} from outside")

    def _arithmetic(self, operands: list[Any]) -> Any:
        for o in operands:
            self.touch(o)
            if type(o) is Known:
                if not isinstance(o.value, (*SIMPLE, Tensor, tuple, list)):
                    raise self.refuse(f"computes with a {type(o.value).__name__}")
            elif o is OPAQUE:
                raise self.refuse("computes with something that is not known before the call")
        return OPAQUE if any(o is READ for o in operands) else FRESH

    def x_BinOp(self, node: ast.BinOp, scope: _Scope) -> Any:
        return self._arithmetic([self.expression(node.left, scope), self.expression(node.right, scope)])

    def x_UnaryOp(self, node: ast.UnaryOp, scope: _Scope) -> Any:
        return self._arithmetic([self.expression(node.operand, scope)])

    def x_BoolOp(self, node: ast.BoolOp, scope: _Scope) -> Any:
        return _join([self._guarded(v, scope) for v in node.values])

    def _guarded(self, node: ast.expr, scope: _Scope) -> Any:
        return self.touch(self.expression(node, scope))

    def x_Compare(self, node: ast.Compare, scope: _Scope) -> Any:
        for side in [node.left, *node.comparators]:
            if self._guarded(side, scope) is READ:
                return OPAQUE
        return FRESH

    def x_IfExp(self, node: ast.IfExp, scope: _Scope) -> Any:
        self.test(node.test, scope)
        return _join([self.expression(node.body, scope), self.expression(node.orelse, scope)])

    def x_Tuple(self, node: Any, scope: _Scope) -> Any:
        return tuple(self.expression(e.value if isinstance(e, ast.Starred) else e, scope) for e in node.elts)

    def x_List(self, node: Any, scope: _Scope) -> Any:
        return self._container([self.expression(e.value if isinstance(e, ast.Starred) else e, scope) for e in node.elts])

    x_Set = x_List

    def x_Dict(self, node: ast.Dict, scope: _Scope) -> Any:
        return self._container([self.expression(v, scope) for v in node.values])

    def _container(self, parts: list[Any]) -> Any:
        if any(p is READ for p in parts):
            return tuple(parts)
        return FRESH if all(_harmless(p) for p in parts) else OPAQUE

    def x_Slice(self, node: ast.Slice, scope: _Scope) -> Any:
        for part in (node.lower, node.upper, node.step):
            if part is not None:
                self._guarded(part, scope)
        return FRESH

    def x_JoinedStr(self, node: ast.JoinedStr, scope: _Scope) -> Any:
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                self._guarded(part.value, scope)
        return FRESH

    def x_NamedExpr(self, node: ast.NamedExpr, scope: _Scope) -> Any:
        value = self.expression(node.value, scope)
        self.assign(node.target, value, scope)
        return value

    def x_Lambda(self, node: ast.Lambda, scope: _Scope) -> Any:
        return Local(node, scope)

    def x_ListComp(self, node: Any, scope: _Scope) -> Any:
        inner = _Scope(None, scope, {}, scope.file, None)
        for generator in node.generators:
            self.assign(generator.target, self.elements(self.expression(generator.iter, inner)), inner)
            for condition in generator.ifs:
                self.test(condition, inner)
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        values = [self.expression(p, inner) for p in parts]
        return Several(((values[-1]),)) if type(values[-1]) is Several else self._container(values)

    x_SetComp = x_GeneratorExp = x_DictComp = x_ListComp


# --- helpers -----------------------------------------------------------------------------------------------------------

def _harmless(value: Any) -> bool:
    """True when holding this value in a new container cannot let somebody change an outside object through it."""
    if type(value) is Several:
        return all(_harmless(v) for v in value.options)
    if type(value) is tuple:
        return all(_harmless(v) for v in value)
    if type(value) is Known:
        return isinstance(value.value, (*SIMPLE, Tensor))
    return value is FRESH


def _join(values: list[Any]) -> Any:
    """A value that stands for any of these."""
    if not values:
        return FRESH
    first = values[0]
    if all(_signature(v) == _signature(first) for v in values[1:]):
        return first
    if any(v is OPAQUE for v in values):
        return OPAQUE
    if any(v is READ for v in values):
        return OPAQUE
    options: list[Any] = []
    for v in values:
        options.extend(v.options if type(v) is Several else (v,))
    return Several(tuple(options))


def _merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {k: a[k] if k not in b else b[k] if k not in a else _join([a[k], b[k]]) for k in {**a, **b}}


def _signature(value: Any) -> Any:
    if type(value) is Known:
        return "known", id(value.value), value.path.identity if value.path else None
    if type(value) is tuple:
        return tuple(_signature(v) for v in value)
    if type(value) is Several:
        return "several", tuple(_signature(v) for v in value.options)
    return id(value)


def _self_path(callee: Known) -> Path | None:
    path = callee.path
    return Path(path.root, path.steps[:-1]) if path is not None and path.steps else None


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _word(node: ast.AST) -> str:
    return type(node).__name__.lower()


_parsed: dict[tuple[str, int], dict[tuple[int, str], list[tuple[Any, types.CodeType]]]] = {}


def function_syntax(function: types.FunctionType) -> tuple[Any, str]:
    """The syntax tree of a function and its file, or (None, file) when the source is not at hand, or is not that of
    the code that runs."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    key = code.co_filename, hash(tuple(lines))
    if key not in _parsed:
        _parsed[key] = _index_file("".join(lines), code.co_filename)
    candidates = _parsed[key].get((code.co_firstlineno, code.co_name), [])
    matching = [node for node, compiled in candidates if compiled.co_code == code.co_code
                and compiled.co_names == code.co_names]
    return (matching[0] if len(matching) == 1 else None), code.co_filename


def _index_file(text: str, file: str) -> dict[tuple[int, str], list[tuple[Any, types.CodeType]]]:
    try:
        tree = ast.parse(text)
        top = builtins.compile(text, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return {}
    codes: dict[tuple[int, str], list[types.CodeType]] = {}
    stack = [top]
    while stack:
        code = stack.pop()
        codes.setdefault((code.co_firstlineno, code.co_name), []).append(code)
        stack.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
    found: dict[tuple[int, str], list[tuple[Any, types.CodeType]]] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            first = min([node.lineno, *[d.lineno for d in getattr(node, "decorator_list", [])]])
            place = first, getattr(node, "name", "<lambda>")
            if len(codes.get(place, [])) == 1:        # two lambdas on one line cannot be told apart
                found.setdefault(place, []).append((node, codes[place][0]))
    return found
