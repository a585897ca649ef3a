"""Statements of the abstract evaluation: what may be stored where, and how branches and loops join."""

from __future__ import annotations

import ast
from typing import Any

from jitgrad.compile.evaluator import Evaluator, word_for
from jitgrad.compile.values import FRESH, SIMPLE, Impure, Known, Local, Scope, Several, merge
from jitgrad.nn.module import Module
from jitgrad.tensor import Tensor


class Statements(Evaluator):
    """Methods ``s_Name`` carry out the statement of that name."""

    def block(self, statements: list[ast.stmt], scope: Scope) -> None:
        for statement in statements:
            self.where = scope.file, statement.lineno
            method = getattr(self, "s_" + type(statement).__name__, None)
            if method is None:
                raise self.refuse(f"has a {word_for(statement)} statement")
            try:
                method(statement, scope)
            except Impure:
                if not self.trusted:
                    raise
                for target in getattr(statement, "targets", ()):    # the user vouches for it
                    self.assign(target, FRESH, scope)

    def s_Pass(self, node: ast.Pass, scope: Scope) -> None:
        """Nothing."""

    s_Break = s_Continue = s_Pass

    def s_Raise(self, node: ast.Raise, scope: Scope) -> None:
        """Not reached while the guards hold: the call that was recorded did not reach it."""

    def s_Expr(self, node: ast.Expr, scope: Scope) -> None:
        self.expression(node.value, scope)

    def s_Return(self, node: ast.Return, scope: Scope) -> None:
        scope.returned.append(Known(None) if node.value is None else self.touch(self.expression(node.value, scope)))

    def s_Assert(self, node: ast.Assert, scope: Scope) -> None:
        self.test(node.test, scope)

    def s_Assign(self, node: ast.Assign, scope: Scope) -> None:
        value = self.expression(node.value, scope)
        for target in node.targets:
            self.assign(target, value, scope)

    def s_AnnAssign(self, node: ast.AnnAssign, scope: Scope) -> None:
        if node.value is not None:
            self.assign(node.target, self.expression(node.value, scope), scope)

    def s_AugAssign(self, node: ast.AugAssign, scope: Scope) -> None:
        value = self.expression(node.value, scope)
        if isinstance(node.target, ast.Name):
            old = self.expression(ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target), scope)
            if type(old) is Known and not isinstance(old.value, (*SIMPLE, tuple, Tensor)):
                raise self.refuse(f"changes {node.target.id} in place")
            self.assign(node.target, self.arithmetic([old, value]), scope)
        else:
            self.assign(node.target, FRESH, scope, augmented=True)

    def s_If(self, node: ast.If, scope: Scope) -> None:
        self.test(node.test, scope)
        before = dict(scope.names)
        self.block(node.body, scope)
        taken, scope.names = scope.names, before
        self.block(node.orelse, scope)
        scope.names = merge(taken, scope.names)

    def s_While(self, node: ast.While, scope: Scope) -> None:
        for _ in range(2):
            before = dict(scope.names)
            self.test(node.test, scope)
            self.block(node.body, scope)
            scope.names = merge(before, scope.names)
        self.block(node.orelse, scope)

    def s_For(self, node: ast.For, scope: Scope) -> None:
        element = self.elements(self.expression(node.iter, scope))
        for _ in range(2):                            # twice: what the first pass assigns is seen by the second
            before = dict(scope.names)
            self.assign(node.target, element, scope)
            self.block(node.body, scope)
            scope.names = merge(before, scope.names)
        self.block(node.orelse, scope)

    def s_With(self, node: ast.With, scope: Scope) -> None:
        for item in node.items:
            context = self.expression(item.context_expr, scope)
            if context is not FRESH:
                raise self.refuse("enters a context that is not jitgrad's")
            if item.optional_vars is not None:
                self.assign(item.optional_vars, FRESH, scope)
        self.block(node.body, scope)

    def s_FunctionDef(self, node: ast.FunctionDef, scope: Scope) -> None:
        if node.decorator_list:
            raise self.refuse("defines a decorated function")
        scope.names[node.name] = Local(node, scope)

    def s_Delete(self, node: ast.Delete, scope: Scope) -> None:
        for target in node.targets:
            if not isinstance(target, ast.Name) or target.id not in scope.names:
                raise self.refuse("deletes something that is not a local name")

    def assign(self, target: Any, value: Any, scope: Scope, augmented: bool = False) -> None:
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
