"""Expressions of the abstract evaluation."""

from __future__ import annotations

import ast
import types
from typing import Any, cast

from jitgrad.compile.evaluator import Evaluator, is_trusted_code, word_for
from jitgrad.compile.values import FRESH, OPAQUE, SIMPLE, Known, Local, Scope, Several, harmless, join
from jitgrad.nn.module import Module
from jitgrad.optim.optimizer import Optimizer
from jitgrad.tensor import Tensor

PURE_METHODS = {dict: ("get", "keys", "values", "items", "copy"), list: ("index", "count", "copy"),
                tuple: ("index", "count"), str: ("format", "join", "startswith", "endswith", "split", "strip", "upper",
                                                 "lower", "replace", "find"), set: ("copy",), frozenset: ()}
FRESH_METHODS = frozenset(("append", "extend", "insert", "pop", "items", "keys", "values", "get", "update", "setdefault",
                           "copy", "index", "count", "reverse", "sort", "add", "format", "join", "startswith",
                           "endswith", "_replace", "_asdict", "save_for_backward"))
IMPURE_TENSOR_METHODS = frozenset(("numpy", "tolist", "data_ptr", "storage_offset", "register_hook", "retain_grad",
                                   "__dlpack__", "share_memory_", "apply_", "map_", "register_post_accumulate_grad_hook"))


class Expressions(Evaluator):
    """Methods ``x_Name`` evaluate the expression of that name."""

    def expression(self, node: Any, scope: Scope) -> Any:
        method = getattr(self, "x_" + type(node).__name__, None)
        if method is None:
            raise self.refuse(f"has a {word_for(node)} expression")
        return method(node, scope)

    def x_Constant(self, node: ast.Constant, scope: Scope) -> Any:
        return Known(node.value)

    def x_Name(self, node: ast.Name, scope: Scope) -> Any:
        try:
            found = scope.lookup(node.id)
        except (KeyError, AttributeError, ValueError):
            return OPAQUE                             # unbound on this path; Python would raise
        if type(found) is Known and isinstance(found.value, SIMPLE):
            self.reach(found)
        return found

    def x_Attribute(self, node: ast.Attribute, scope: Scope) -> Any:
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
        if isinstance(described, property) and not is_trusted_code(described.fget):
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

    def x_Call(self, node: ast.Call, scope: Scope) -> Any:
        args: list[Any] = []
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
            return join([self._call_method(o, name, args, kwargs) for o in owner.options])
        if owner is FRESH or type(owner) is tuple:
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
        if not hasattr(Tensor, name) and name not in FRESH_METHODS:
            raise self.refuse(f"calls {name}(), which is not known to be free of effects")
        self.functions_among(args, kwargs)
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

    def x_Subscript(self, node: ast.Subscript, scope: Scope) -> Any:
        owner = self.expression(node.value, scope)
        key = self.expression(node.slice, scope)
        if type(owner) is Several:
            self.touch(owner)
            tensors = all(o is FRESH or (type(o) is Known and isinstance(o.value, Tensor)) for o in owner.options)
            return FRESH if tensors else OPAQUE
        if type(owner) is tuple:
            return owner[key.value] if type(key) is Known and type(key.value) is int else join(list(owner))
        if type(owner) is Known and not isinstance(owner.value, Tensor):
            self.reach(owner)
            if type(key) is Known:
                return self.item(owner, key.value)
            if type(owner.value) is dict:
                return join([self.item(owner, k) for k in owner.value])
            return self.elements(owner)
        self.touch(owner)
        return owner if owner is OPAQUE else FRESH

    def item(self, owner: Known, key: Any) -> Any:
        """``owner[key]`` of a known container."""
        container: Any = owner.value
        if isinstance(container, Module):
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
            return join([o[0] if type(o) is tuple and len(o) == 1 else o for o in value.options])
        if type(value) is tuple:
            return join(list(value))
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
            return Several(tuple(Known(m) for m in iter(cast(Any, value))))
        if type(value) in (list, tuple):
            self.reach(known)
            return join([self.item(known, k) for k in range(len(value))])
        if type(value) is dict:
            self.reach(known)
            return join([Known(k) for k in value])
        if isinstance(value, (range, str)):
            return FRESH
        raise self.refuse(f"iterates over a {type(value).__name__} from outside")

    def arithmetic(self, operands: list[Any]) -> Any:
        for o in operands:
            self.touch(o)
            if type(o) is Known:
                if not isinstance(o.value, (*SIMPLE, Tensor, tuple, list)):
                    raise self.refuse(f"computes with a {type(o.value).__name__}")
            elif o is OPAQUE:
                raise self.refuse("computes with something that is not known before the call")
        return FRESH

    def x_BinOp(self, node: ast.BinOp, scope: Scope) -> Any:
        return self.arithmetic([self.expression(node.left, scope), self.expression(node.right, scope)])

    def x_UnaryOp(self, node: ast.UnaryOp, scope: Scope) -> Any:
        return self.arithmetic([self.expression(node.operand, scope)])

    def x_BoolOp(self, node: ast.BoolOp, scope: Scope) -> Any:
        return join([self._guarded(v, scope) for v in node.values])

    def _guarded(self, node: ast.expr, scope: Scope) -> Any:
        return self.touch(self.expression(node, scope))

    def x_Compare(self, node: ast.Compare, scope: Scope) -> Any:
        for side in [node.left, *node.comparators]:
            self._guarded(side, scope)
        return FRESH

    def x_IfExp(self, node: ast.IfExp, scope: Scope) -> Any:
        self.test(node.test, scope)
        return join([self.expression(node.body, scope), self.expression(node.orelse, scope)])

    def x_Tuple(self, node: Any, scope: Scope) -> Any:
        return tuple(self.expression(e.value if isinstance(e, ast.Starred) else e, scope) for e in node.elts)

    def x_List(self, node: Any, scope: Scope) -> Any:
        return self._container([self.expression(e.value if isinstance(e, ast.Starred) else e, scope) for e in node.elts])

    x_Set = x_List

    def x_Dict(self, node: ast.Dict, scope: Scope) -> Any:
        return self._container([self.expression(v, scope) for v in node.values])

    def _container(self, parts: list[Any]) -> Any:
        return FRESH if all(harmless(p) for p in parts) else OPAQUE

    def x_Slice(self, node: ast.Slice, scope: Scope) -> Any:
        for part in (node.lower, node.upper, node.step):
            if part is not None:
                self._guarded(part, scope)
        return FRESH

    def x_JoinedStr(self, node: ast.JoinedStr, scope: Scope) -> Any:
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                self._guarded(part.value, scope)
        return FRESH

    def x_NamedExpr(self, node: ast.NamedExpr, scope: Scope) -> Any:
        value = self.expression(node.value, scope)
        self.assign(node.target, value, scope)
        return value

    def x_Lambda(self, node: ast.Lambda, scope: Scope) -> Any:
        return Local(node, scope)

    def x_ListComp(self, node: Any, scope: Scope) -> Any:
        inner = Scope(None, scope, {}, scope.file, None)
        for generator in node.generators:
            self.assign(generator.target, self.elements(self.expression(generator.iter, inner)), inner)
            for condition in generator.ifs:
                self.test(condition, inner)
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        values = [self.expression(p, inner) for p in parts]
        return Several(((values[-1]),)) if type(values[-1]) is Several else self._container(values)

    x_SetComp = x_GeneratorExp = x_DictComp = x_ListComp
