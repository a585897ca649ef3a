"""Looking at the source of a user's function: may its body be skipped when the guards hold?

The functions that a call can reach are read as syntax trees and evaluated abstractly. A value is `Known` (an object that
exists, with the path on which the function gets to it), `FRESH` (made by this call: Tensors, numbers, containers of
them) or `OPAQUE` (anything else). What is allowed: ops, pure built-in
functions, branches and loops over known things, user functions and Modules that are allowed themselves, and stores into
local names, Tensors, ``.grad`` and attributes of Modules. Everything else raises `Impure` with the line and the reason,
and the function stays replayed. In doubt it is impure.

What comes out is the list of guards that the calls to come have to check, and the objects that were reached.
"""

from __future__ import annotations

import ast
import operator
import types
from typing import Any

from jitgrad.compile.evaluator import Findings, is_trusted_code
from jitgrad.compile.expressions import Expressions
from jitgrad.compile.statements import Statements
from jitgrad.compile.syntax import function_syntax
from jitgrad.compile.values import (
    FRESH,
    OPAQUE,
    SIMPLE,
    Known,
    Local,
    Path,
    Scope,
    Several,
    harmless,
    join,
    signature,
)
from jitgrad.nn.module import Module

HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
PURE_BUILTINS = frozenset((abs, all, any, bool, complex, dict, divmod, enumerate, float, frozenset, getattr, hasattr, int,
                           isinstance, issubclass, len, list, max, min, pow, range, reversed, round, set, slice, sorted,
                           str, sum, tuple, type, zip, callable))

PURE_MODULES = ("math", "operator", "_operator", "jitgrad.devices")


def analyze(function: Any, arguments: dict[Any, Any], trusted: bool = False) -> Findings:
    """Findings about a call of `function` with `arguments` (by position or name); `Impure` when it must be replayed.
    With `trusted` the user vouches for it: what cannot be seen through is taken to be free of effects."""
    analysis = _Analysis()
    analysis.trusted = trusted
    known = {k: Known(v, Path(("argument", None, k))) for k, v in arguments.items()}
    positional = [known[k] for k in sorted(k for k in known if isinstance(k, int))]
    named = {k: v for k, v in known.items() if isinstance(k, str)}
    analysis.where = None
    if isinstance(function, types.MethodType):
        positional.insert(0, Known(function.__self__, Path(("self", function, "self"))))
        function = function.__func__
    analysis.call(Known(function), positional, named)
    return analysis.findings


class _Analysis(Statements, Expressions):
    """Abstract evaluation: calls."""

    def call(self, callee: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The abstract result of a call."""
        if type(callee) is Several:
            return join([self.call(c, args, kwargs) for c in callee.options])
        if type(callee) is Local:
            return self._call_local(callee, args, kwargs)
        if callee is FRESH:
            self.functions_among(args, kwargs)
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
        if is_trusted_code(value):
            self.functions_among(args, kwargs)
            return FRESH
        if isinstance(value, types.FunctionType):
            return self._call_function(value, callee, args, kwargs)
        if _hashable(value) and value in PURE_BUILTINS:
            return self._call_builtin(value, args, kwargs)
        if getattr(value, "__module__", None) in PURE_MODULES and value is not operator.setitem:
            return FRESH
        if isinstance(value, type) and issubclass(value, BaseException):
            return OPAQUE
        name = getattr(value, "__qualname__", None) or f"an object of type {type(value).__qualname__}"
        raise self.refuse(f"calls {name}, which is not known to be free of effects")

    def functions_among(self, args: list[Any], kwargs: dict[str, Any]) -> None:
        """User functions that are handed to trusted code will be called by it."""
        for a in [*args, *kwargs.values()]:
            if type(a) is Local:
                self.call(a, [FRESH] * len(a.node.args.args), {})
            elif type(a) is Known and isinstance(a.value, types.FunctionType) and not is_trusted_code(a.value):
                self.call(a, [FRESH] * a.value.__code__.co_argcount, {})
            elif type(a) is Known and isinstance(a.value, Module):
                self.call(a, [FRESH], {})
            elif type(a) is Known and isinstance(a.value, types.MethodType) and not is_trusted_code(a.value.__func__):
                self.call(a, [FRESH] * (a.value.__func__.__code__.co_argcount - 1), {})
            elif type(a) is Known and type(a.value) in (list, tuple) and any(map(_is_called, a.value)):
                self.touch(a)
                self.functions_among([Known(v) for v in a.value], {})
            else:
                self.touch(a)

    def _call_module(self, module: Module, callee: Known, args: list[Any], kwargs: dict[str, Any]) -> Any:
        forward: Any = type(module).forward
        for child in module.modules():
            if any(child.__dict__[table].entries for table in HOOK_TABLES):
                raise self.refuse(f"{type(child).__name__} has hooks")
        if not is_trusted_code(forward):
            return self._call_function(forward, Known(forward), [callee, *args], kwargs)
        for child in module.modules():                # a layer of ours that may call the user's layers
            inner: Any = type(child).forward
            if child is not module and not is_trusted_code(inner):
                count = inner.__code__.co_argcount - 1
                self._call_function(inner, Known(forward), [Known(child), *[FRESH] * count], {})
        return FRESH

    def _call_builtin(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        for a in args:
            if type(a) is Known:
                self.reach(a)
        if function is len and args and type(args[0]) is Known and isinstance(args[0].value, (*SIMPLE, list, tuple, dict)):
            return Known(len(args[0].value))
        if function is getattr and len(args) >= 2 and type(args[1]) is Known:
            return self.attribute(args[0], args[1].value)
        if function in (enumerate, zip, reversed, list, tuple, sorted) and not kwargs:
            return self._iterator(function, args)
        return FRESH if all(harmless(a) for a in args) else OPAQUE

    def _iterator(self, function: Any, args: list[Any]) -> Any:
        elements = [self.elements(a) for a in args]
        if function is enumerate:
            return Several(((FRESH, join(elements)),))
        if function is zip:
            return Several((tuple(join([e]) for e in elements),))
        return Several((elements[0],)) if elements else FRESH

    def _call_function(self, function: types.FunctionType, callee: Known, args: list[Any], kwargs: dict[str, Any]) -> Any:
        node, file = function_syntax(function)
        if node is None:
            raise self.refuse(f"the source of {function.__qualname__} is not at hand")
        key = function.__code__, tuple([signature(a) for a in args]), tuple((k, signature(v)) for k, v in kwargs.items())
        if key in self.finished:
            return self.finished[key]
        if key in self.running or len(self.running) > 100:
            raise self.refuse(f"{function.__qualname__} calls itself")
        defaults = dict(zip(reversed([a.arg for a in node.args.posonlyargs + node.args.args]),
                            [Known(d) for d in reversed(function.__defaults__ or ())]))
        defaults.update({k: Known(d) for k, d in (function.__kwdefaults__ or {}).items()})
        names = self._bind(node.args, args, kwargs, defaults)
        scope = Scope(function, None, names, file, callee.path)
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
        result = self.body_of(local.node, Scope(None, local.scope, names, local.scope.file, None))
        self.running.discard(local.node)
        return result

    def _bind(self, spec: ast.arguments, args: list[Any], kwargs: dict[str, Any],
              defaults: dict[str, Any]) -> dict[str, Any]:
        parameters = [a.arg for a in spec.posonlyargs + spec.args]
        names = {**defaults, **dict(zip(parameters, args))}
        if spec.vararg:
            names[spec.vararg.arg] = tuple(args[len(parameters):])
        keywords = set(parameters) | {a.arg for a in spec.kwonlyargs}
        names.update({k: v for k, v in kwargs.items() if k in keywords})
        if spec.kwarg:
            rest = [v for k, v in kwargs.items() if k not in keywords]
            names[spec.kwarg.arg] = FRESH if all(harmless(v) for v in rest) else OPAQUE
        for a in spec.posonlyargs + spec.args + spec.kwonlyargs:
            names.setdefault(a.arg, FRESH)
        return names
    def body_of(self, node: Any, scope: Scope) -> Any:
        if isinstance(node, ast.Lambda):
            return self.expression(node.body, scope)
        self.block(node.body, scope)
        return join(scope.returned) if scope.returned else Known(None)


def _self_path(callee: Known) -> Path | None:
    path = callee.path
    return Path(path.root, path.steps[:-1]) if path is not None and path.steps else None


def _is_called(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, types.MethodType, Module))


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
