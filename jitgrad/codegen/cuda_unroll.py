"""GPU kernels with registers in rows: from a hand-written function to the text that is compiled, with everything unrolled
that must be.

A register has no address, so that what a thread keeps in many of them must have as many names. In the function it is written
as an array: ``s = registers()`` declares one, ``s[i, j]`` is one register, ``s[i, :4]`` four of them as a tuple, on either
side of an assignment. A loop ``for i in each(4):`` is written out, an ``if`` whose condition is a constant is decided, and a
call of a *piece*, a function of the same module that is a list of statements, is replaced by them. What remains is ordinary
text of a kernel: bare arithmetic is that of indices, each step cast to their type; arithmetic of values stands in a cast
(``f32(x * y)``).
"""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

UNROLLED = "unrolled"
"""The docstring of such text: it is compiled without Numba's type inference (`cuda_direct`)."""

Constant = int | float | str
Constants = Mapping[str, Constant]
Kernel = Callable[..., Any]

CASTS = ("f64", "f32", "i64", "i16", "u64", "u32", "boolean")
WITH_INDEX = {"load": (1,), "load_lanes": (1,), "store": (1,), "store_lanes": (1,), "copy_async": (0, 2, 3)}
"""Which arguments of these are indices; the others are values, or constants."""


def spell(name: str, kernel: Kernel, constants: Constants, pieces: tuple[Kernel, ...] = (), wide: bool = False) -> str:
    """The text of `kernel` under that name, with numbers, types and names of functions in the places of `constants`, and
    indices in int32, in int64 if `wide`."""
    return _spell(name, kernel, tuple(constants.items()), pieces, wide)


@lru_cache(maxsize=256)
def _spell(name: str, kernel: Kernel, constants: tuple[tuple[str, Constant], ...], pieces: tuple[Kernel, ...],
           wide: bool) -> str:
    kind = "i64" if wide else "i32"
    function = _parse(kernel)
    unroll = _Unroll({**dict(constants), "N": kind}, {piece.__name__: _parse(piece) for piece in pieces})
    function.name = name
    for argument in function.args.args:
        argument.annotation = unroll.annotation(argument.annotation)
    function.returns = unroll.annotation(function.returns)
    body = unroll.block(function.body)
    function.body = [ast.Expr(ast.Constant(UNROLLED)), *[_Typed(kind).visit(statement) for statement in body]]
    return ast.unparse(ast.fix_missing_locations(function)) + "\n"


def _parse(function: Kernel) -> ast.FunctionDef:
    (tree,) = ast.parse(inspect.getsource(function)).body
    assert isinstance(tree, ast.FunctionDef)
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    return tree


OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.LShift: operator.lshift, ast.RShift: operator.rshift}
NEUTRAL = {ast.Add: 0, ast.Sub: 0, ast.Mult: 1, ast.FloorDiv: 1, ast.LShift: 0, ast.RShift: 0, ast.BitXor: 0}
"""What as the right operand changes nothing."""
COMPARISONS: dict[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge}


class _Unroll:
    """Writes out loops, pieces and names of registers; what goes in stays as it is. `known`: what names stand for: numbers,
    other names, expressions."""

    def __init__(self, known: dict[str, Constant | ast.expr], pieces: Mapping[str, ast.FunctionDef]):
        self.known, self.pieces = known, pieces

    # ---- statements

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        return [made for statement in statements for made in self.statements(statement)]

    def statements(self, statement: ast.stmt) -> list[ast.stmt]:
        called = _called(statement)
        if called == "registers":
            return []
        if called in self.pieces:
            return self.piece(self.pieces[called], statement.value)  # type: ignore[attr-defined]
        if isinstance(statement, ast.For):
            return self.loop(statement)
        if isinstance(statement, ast.If):
            return self.branch(statement)
        return [self.copied(statement)]

    def piece(self, function: ast.FunctionDef, call: ast.Call) -> list[ast.stmt]:
        """The statements of a piece, with what is given in the places of its parameters."""
        given = [self.expression(argument) for argument in call.args]
        before = dict(self.known)
        self.known.update(zip([a.arg for a in function.args.args], given, strict=True))
        made = self.block(function.body)
        self.known = before
        return made

    def loop(self, loop: ast.For) -> list[ast.stmt]:
        call, target = loop.iter, loop.target
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and isinstance(target, ast.Name)
        if call.func.id != "each":
            return [ast.For(target, self.expression(call), self.block(loop.body), [])]
        made = []
        for k in range(self.integer(call.args[0])):
            self.known[target.id] = k
            made += self.block(loop.body)
        self.known.pop(target.id, None)
        return made

    def branch(self, branch: ast.If) -> list[ast.stmt]:
        test = self.expression(branch.test)
        if isinstance(test, ast.Constant):
            return self.block(branch.body if test.value else branch.orelse)
        return [ast.If(test, self.block(branch.body), self.block(branch.orelse))]

    # ---- expressions

    def copied(self, node: Any) -> Any:
        """A copy of anything, with its expressions replaced."""
        if isinstance(node, ast.expr):
            return self.expression(node)
        if isinstance(node, list):
            return [self.copied(part) for part in node]
        if isinstance(node, ast.AST):
            return type(node)(**{name: self.copied(part) for name, part in ast.iter_fields(node)})
        return node

    def expression(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Name):
            return self.name(node)
        if isinstance(node, ast.Subscript):
            return self.register(node)
        made: ast.expr = type(node)(**{name: self.copied(part) for name, part in ast.iter_fields(node)})
        if isinstance(made, ast.BinOp):
            return _folded(made)
        if isinstance(made, ast.Compare) and isinstance(made.left, ast.Constant) \
                and isinstance(made.comparators[0], ast.Constant):
            return ast.Constant(COMPARISONS[type(made.ops[0])](made.left.value, made.comparators[0].value))  # type: ignore[arg-type]
        return made

    def name(self, node: ast.Name) -> ast.expr:
        value = self.known.get(node.id)
        if value is None:
            return ast.Name(node.id, node.ctx)
        if isinstance(value, ast.expr):
            return _Unroll({}, {}).expression(value)
        return ast.Name(value, node.ctx) if isinstance(value, str) else ast.Constant(value)

    def annotation(self, node: ast.expr | None) -> ast.expr:
        """A type of a parameter, or ``block[threads]``."""
        assert isinstance(node, ast.Name | ast.Subscript)
        return ast.Subscript(node.value, self.expression(node.slice), ast.Load()) if isinstance(
            node, ast.Subscript) else self.name(node)

    def register(self, node: ast.Subscript) -> ast.expr:
        array = self.expression(node.value)
        assert isinstance(array, ast.Name)
        places = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        names = [array.id]
        for place in places:
            names = [f"{name}_{k}" for name in names for k in self.places(place)]
        made: list[ast.expr] = [ast.Name(name, node.ctx) for name in names]
        return ast.Tuple(made, node.ctx) if isinstance(places[-1], ast.Slice) else made[0]

    def places(self, place: ast.expr) -> range:
        if not isinstance(place, ast.Slice):
            return range(self.integer(place), self.integer(place) + 1)
        assert place.upper is not None
        return range(self.integer(place.lower) if place.lower else 0, self.integer(place.upper))

    def integer(self, node: ast.expr) -> int:
        made = self.expression(node)
        assert isinstance(made, ast.Constant) and isinstance(made.value, int), "this must be a constant"
        return made.value


def _called(statement: ast.stmt) -> str:
    """The function that a statement calls for its own sake; ``registers`` for declarations."""
    value = statement.value if isinstance(statement, ast.Expr | ast.Assign) else None
    if isinstance(value, ast.Tuple) and value.elts:
        value = value.elts[0]
    return value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else ""


def _folded(node: ast.BinOp) -> ast.expr:
    """Integers computed, and neutral ones left out."""
    left, right, kind = node.left, node.right, type(node.op)
    if not isinstance(right, ast.Constant) or type(right.value) is not int:
        return right if isinstance(left, ast.Constant) and left.value == 0 and kind is ast.Add else node
    if isinstance(left, ast.Constant) and type(left.value) is int and kind in OPERATORS:
        return ast.Constant(OPERATORS[kind](left.value, right.value))
    return left if NEUTRAL.get(kind) == right.value else node


class _Typed(ast.NodeTransformer):
    """Casts every step of index arithmetic to `kind`; division is unsigned, since no index is negative."""

    def __init__(self, kind: str):
        self.kind = kind
        self.of_values = False

    def within(self, of_values: bool, node: ast.expr) -> ast.expr:
        before, self.of_values = self.of_values, of_values
        made: ast.expr = self.visit(node)
        self.of_values = before
        return made

    def cast(self, node: ast.expr) -> ast.expr:
        return _call(self.kind, node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        left, right = self.visit(node.left), self.visit(node.right)
        if self.of_values:
            return ast.BinOp(left, node.op, right)
        if isinstance(node.op, ast.FloorDiv | ast.Mod):
            return _call("quotient" if isinstance(node.op, ast.FloorDiv) else "rest", left, right)
        return self.cast(ast.BinOp(left, node.op, right))

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return node if self.of_values or type(node.value) is not int else self.cast(node)

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        operands = [self.within(False, operand) for operand in (node.left, *node.comparators)]
        return ast.Compare(operands[0], node.ops, operands[1:])

    def visit_Call(self, node: ast.Call) -> ast.expr:
        assert isinstance(node.func, ast.Name)
        name = node.func.id
        if name in ("thread", "block"):
            return self.cast(node)
        if name in ("min", "max", self.kind) and not self.of_values:
            return self.cast(_call(name, *[self.visit(a) for a in node.args]))
        if name.startswith("load_matrix") or name == "range":
            return _call(name, *[self.within(False, a) for a in node.args])
        places = WITH_INDEX.get(name, ())
        return _call(name, *[self.within(k not in places, a) for k, a in enumerate(node.args)])


def _call(name: str, *arguments: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])
