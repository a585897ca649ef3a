"""What type every variable and every expression of a function has, from the types of its arguments.

The functions are those of kernels and of scalar math: numbers, pointers and tuples, loops over ranges, and calls of the
vocabulary. A variable has one type throughout, to which all that it is given is converted. The statements are read from
top to bottom, and again while a variable turned out to have another type than where it was read.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numba.core import types

from jitgrad.kernels.cpu.contexts import Kind, Operation, kind_of_global, operation, unify

OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.LShift: operator.lshift,
    ast.RShift: operator.rshift, ast.BitOr: operator.or_, ast.BitXor: operator.xor, ast.BitAnd: operator.and_,
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}

UNKNOWN = types.undefined
_MISSING = object()


class Types:
    """The types in a function. `variables`: of each variable; `kinds`: of each expression; `operations`: what each operator
    and call is, and each comparison of a chain; `constants`: the values of names and expressions that have one;
    `in_memory`: the variables that are given something in several places, or are read where that may not have happened;
    `result`: what the function returns."""

    def __init__(self, tree: ast.FunctionDef, arguments: Sequence[Kind], names: Mapping[str, Any]):
        self.names = names
        self.arguments = [a.arg for a in tree.args.args]
        self.variables: dict[str, Kind] = dict(zip(self.arguments, arguments, strict=True))
        self.local = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        self.local.update(self.arguments)
        self.operations: dict[Any, Operation] = {}
        self.kinds: dict[ast.expr, Kind] = {}
        self.constants: dict[ast.expr, Any] = {}
        self.in_memory: set[str] = set()
        self.settled = False
        while not self.settled:
            self._read(tree)
        for name, kind in self.variables.items():
            self.variables[name] = types.unliteral(kind)

    def _read(self, tree: ast.FunctionDef) -> None:
        self.settled, self.seen = True, set[str]()
        self.home: dict[str, tuple[int, ...]] = {name: () for name in self.arguments}
        self.path: tuple[int, ...] = ()
        self.blocks = 0
        self.returned: list[Kind] = []
        self.block(tree.body)
        self.result = unify([types.unliteral(kind) for kind in self.returned]) if self.returned else types.none

    # ---- statements

    def block(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            getattr(self, f"read_{type(statement).__name__.lower()}")(statement)

    def inner(self, statements: Sequence[ast.stmt], given: Sequence[tuple[ast.expr, Kind]] = ()) -> None:
        """A block in a block, which begins with `given` targets."""
        outer, self.blocks = self.path, self.blocks + 1
        self.path = (*outer, self.blocks)
        for target, kind in given:
            self.give(target, kind)
        self.block(statements)
        self.path = outer

    def read_expr(self, statement: ast.Expr) -> None:
        if not isinstance(statement.value, ast.Constant):                # a docstring
            self.kind(statement.value)

    def read_pass(self, statement: ast.stmt) -> None:
        pass

    read_continue = read_break = read_pass

    def read_assign(self, statement: ast.Assign) -> None:
        (target,) = statement.targets
        if isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
            for part, kind in zip(target.elts, [self.kind(part) for part in statement.value.elts], strict=True):
                self.give(part, kind)
        else:
            self.give(target, self.kind(statement.value))

    def read_augassign(self, statement: ast.AugAssign) -> None:
        kinds = self.kind_of_target(statement.target), self.kind(statement.value)
        self.give(statement.target, self.operate(statement, OPERATORS[type(statement.op)], kinds))

    def read_for(self, statement: ast.For) -> None:
        call = statement.iter
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "range"):
            raise TypeError("a loop must be over a range")
        kinds = [types.unliteral(self.kind(argument)) for argument in call.args]
        kind = self.kinds[call] = UNKNOWN if UNKNOWN in kinds else operation(range, tuple(kinds)).result.dtype
        self.inner(statement.body, [(statement.target, kind)])

    def read_while(self, statement: ast.While) -> None:
        self.kind(statement.test)
        self.inner(statement.body)

    def read_if(self, statement: ast.If) -> None:
        self.kind(statement.test)
        self.inner(statement.body)
        self.inner(statement.orelse)

    def read_return(self, statement: ast.Return) -> None:
        self.returned.append(self.kind(statement.value) if statement.value else types.none)

    def give(self, target: ast.expr, kind: Kind) -> None:
        """`target` gets a value of type `kind`."""
        if isinstance(target, ast.Tuple):
            kinds = [UNKNOWN] * len(target.elts) if kind is UNKNOWN else list(kind)
            for part, own in zip(target.elts, kinds, strict=True):
                self.give(part, own)
        elif isinstance(target, ast.Subscript):
            self.kind(target.value)
            self.kind(target.slice)
        else:
            assert isinstance(target, ast.Name)
            self.give_variable(target.id, kind)

    def give_variable(self, name: str, kind: Kind) -> None:
        if name in self.home:
            self.in_memory.add(name)
        else:
            self.home[name] = self.path
        known = self.variables.get(name, UNKNOWN)
        found = known if kind is UNKNOWN else unify([known, kind])
        if found != known:
            self.variables[name] = found
            self.settled = self.settled and name not in self.seen

    # ---- expressions

    def kind(self, node: ast.expr) -> Kind:
        found: Kind = getattr(self, f"kind_of_{type(node).__name__.lower()}")(node)
        self.kinds[node] = found
        return found

    def kind_of_target(self, target: ast.expr) -> Kind:
        """What a target of ``+=`` holds before."""
        return self.kind_of_name(target) if isinstance(target, ast.Name) else self.kind(target)

    def kind_of_name(self, node: ast.Name) -> Kind:
        name = node.id
        if name not in self.local:
            value = self.constants[node] = self.value_of_global(name)
            return kind_of_global(value)
        home = self.home.get(name)
        if home is None or self.path[:len(home)] != home:
            self.in_memory.add(name)
        self.seen.add(name)
        return self.variables.get(name, UNKNOWN)

    def value_of_global(self, name: str) -> Any:
        found = self.names.get(name, _MISSING)
        if found is _MISSING:
            raise NameError(f"name '{name}' is not defined")
        return found

    def kind_of_constant(self, node: ast.Constant) -> Kind:
        self.constants[node] = node.value
        return kind_of_global(node.value)

    def kind_of_tuple(self, node: ast.Tuple) -> Kind:
        kinds = [types.unliteral(self.kind(part)) for part in node.elts]
        return UNKNOWN if UNKNOWN in kinds else types.Tuple.from_types(kinds)  # type: ignore[no-untyped-call]

    def kind_of_binop(self, node: ast.BinOp) -> Kind:
        kinds, function = (self.kind(node.left), self.kind(node.right)), OPERATORS[type(node.op)]
        return self.folded(node, function, node.left, node.right) or self.operate(node, function, kinds)

    def kind_of_unaryop(self, node: ast.UnaryOp) -> Kind:
        kind = self.kind(node.operand)
        if isinstance(node.op, ast.Not):
            return types.boolean
        function = OPERATORS[type(node.op)]
        return self.folded(node, function, node.operand) or self.operate(node, function, (kind,))

    def folded(self, node: ast.expr, function: Callable[..., Any], *operands: ast.expr) -> Kind | None:
        """The type of an expression of constants, which is one."""
        values = [self.constants.get(operand, _MISSING) for operand in operands if not isinstance(operand, ast.Name)]
        if len(values) < len(operands) or _MISSING in values:
            return None
        value = self.constants[node] = function(*values)
        return kind_of_global(value)

    def kind_of_compare(self, node: ast.Compare) -> Kind:
        kinds = [self.kind(part) for part in (node.left, *node.comparators)]
        for k, sign in enumerate(node.ops):
            self.operate((node, k), OPERATORS[type(sign)], (kinds[k], kinds[k + 1]))
        return types.boolean

    def kind_of_boolop(self, node: ast.BoolOp) -> Kind:
        return unify([types.unliteral(self.kind(part)) for part in node.values])

    def kind_of_ifexp(self, node: ast.IfExp) -> Kind:
        self.kind(node.test)
        return unify([types.unliteral(self.kind(part)) for part in (node.body, node.orelse)])

    def kind_of_subscript(self, node: ast.Subscript) -> Kind:
        base, _ = self.kind(node.value), self.kind(node.slice)
        if base is UNKNOWN:
            return UNKNOWN
        if node.slice in self.constants and not isinstance(base, types.CPointer):
            return base[self.constants[node.slice]]
        return base.dtype                                                # of a tuple, that of all of its elements

    def kind_of_call(self, node: ast.Call) -> Kind:
        if not isinstance(node.func, ast.Name):
            raise TypeError(f"only names can be called, not {ast.unparse(node.func)}")
        return self.operate(node, self.value_of_global(node.func.id), tuple([self.kind(a) for a in node.args]))

    def operate(self, place: Any, function: Callable[..., Any], kinds: tuple[Kind, ...]) -> Kind:
        if UNKNOWN in kinds:
            return UNKNOWN
        found = self.operations[place] = operation(function, kinds)
        return found.result
