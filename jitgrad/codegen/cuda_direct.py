"""Long GPU kernels -> LLVM, statement by statement: what `kernels.cpu.frontend` does after it has found out all types;
unrolled text (`cuda_unroll`) has a thousand variables.

In goes the syntax tree of a function, with a docstring, in which every type is plain: arithmetic is between equal types or
with a literal, and has the type of its left operand that is none. A variable has the type of what it is first given.
Conditions have no side effects: all their parts are computed. What text may call is the vocabulary of all GPU kernels, by
the same definitions. Out comes an LLVM module, unoptimized, with a function of the header's parameters and no result.
"""

from __future__ import annotations

import ast
from typing import Any, NamedTuple

from llvmlite import binding as llvm, ir
from numba.core import cgutils, types as numba_types

from jitgrad.kernels.cpu.contexts import MACHINE, Kind, convert, kind_of_global, operation, refresh
from jitgrad.kernels.cpu.frontend import parse
from jitgrad.kernels.cuda import math, vocabulary

types: Any = numba_types
alloca_once: Any = cgutils.alloca_once
NAMES: dict[str, Any] = {**math.NAMES, **vocabulary.NAMES}

WHOLE = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.LShift: "shl", ast.BitAnd: "and_", ast.BitOr: "or_",
         ast.BitXor: "xor"}
FLOAT = {ast.Add: "fadd", ast.Sub: "fsub", ast.Mult: "fmul", ast.Div: "fdiv"}
COMPARE = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}


class Typed(NamedTuple):
    """A value of LLVM's and its type of Numba's."""

    value: Any
    kind: Kind


def lower_directly(function: ast.FunctionDef, name: str, parameters: tuple[Kind, ...]) -> llvm.ModuleRef:
    """The module of `function` under `name`."""
    refresh()
    module = ir.Module(name)
    kinds = [MACHINE.get_value_type(kind) for kind in parameters]
    made = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), name)
    _Lowering(made, [a.arg for a in function.args.args], parameters).body(function.body)
    return parse(module)


class _Lowering:
    """One function in the making. Variables are memory, which LLVM turns into registers; parameters are values."""

    def __init__(self, function: ir.Function, names: list[str], kinds: tuple[Kind, ...]):
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))
        self.parameters = {name: Typed(value, kind) for name, value, kind in zip(names, function.args, kinds, strict=True)}
        self.variables: dict[str, Typed] = {}

    # ---- statements

    def body(self, statements: list[ast.stmt]) -> None:
        self.block(statements[1:])                              # behind the docstring
        self.builder.ret_void()

    def block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            getattr(self, f"write_{type(statement).__name__.lower()}")(statement)

    def write_expr(self, statement: ast.Expr) -> None:
        self.value(statement.value)

    def write_pass(self, statement: ast.Pass) -> None:
        pass

    def write_assign(self, statement: ast.Assign) -> None:
        (target,) = statement.targets
        if isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
            found = [self.value(part) for part in statement.value.elts]
            for part, value in zip(target.elts, found, strict=True):
                self.keep(part, value)
            return
        value = self.value(statement.value)
        if isinstance(target, ast.Tuple):
            for k, part in enumerate(target.elts):
                self.keep(part, Typed(self.builder.extract_value(value.value, k), list(value.kind)[k]))
        else:
            self.keep(target, value)

    def keep(self, target: ast.expr, value: Typed) -> None:
        assert isinstance(target, ast.Name) and target.id not in self.parameters, "parameters stay what they are"
        known = self.variables.get(target.id)
        if known is None:
            kind = types.unliteral(value.kind)
            slot = alloca_once(self.builder, MACHINE.get_value_type(kind), name=target.id)
            known = self.variables[target.id] = Typed(slot, kind)
        self.builder.store(self.as_kind(value, known.kind), known.value)

    def write_for(self, statement: ast.For) -> None:
        """The number of the round is kept apart from the variable, which the body may change."""
        assert isinstance(statement.iter, ast.Call)
        builder, count = self.builder, self.value(statement.iter.args[0])
        head, inside, behind = [builder.append_basic_block(name) for name in ("head", "inside", "behind")]
        zero, one = [ir.Constant(count.value.type, n) for n in (0, 1)]
        slot = alloca_once(builder, count.value.type)
        builder.store(zero, slot)
        builder.branch(head)
        builder.position_at_end(head)
        number = builder.load(slot)
        builder.cbranch(builder.icmp_signed("<", number, count.value), inside, behind)
        builder.position_at_end(inside)
        self.keep(statement.target, Typed(number, count.kind))
        self.block(statement.body)
        builder.store(builder.add(builder.load(slot), one), slot)
        builder.branch(head)
        builder.position_at_end(behind)

    def write_if(self, statement: ast.If) -> None:
        builder = self.builder
        test = self.value(statement.test).value
        with builder.if_else(test) as (then, otherwise):
            with then:
                self.block(statement.body)
            with otherwise:
                self.block(statement.orelse)

    # ---- expressions

    def value(self, node: ast.expr) -> Typed:
        made: Typed = getattr(self, f"value_of_{type(node).__name__.lower()}")(node)
        return made

    def value_of_name(self, node: ast.Name) -> Typed:
        if node.id in self.variables:
            slot, kind = self.variables[node.id]
            return Typed(self.builder.load(slot), kind)
        if node.id in self.parameters:
            return self.parameters[node.id]
        return Typed(MACHINE.get_dummy_value(), kind_of_global(NAMES[node.id]))

    def value_of_constant(self, node: ast.Constant) -> Typed:
        if isinstance(node.value, float):
            return Typed(ir.Constant(ir.DoubleType(), node.value), types.float64)
        return Typed(ir.Constant(ir.IntType(64), node.value), types.literal(node.value))

    def value_of_tuple(self, node: ast.Tuple) -> Typed:
        parts = [self.value(part) for part in node.elts]
        kind = types.Tuple.from_types([types.unliteral(part.kind) for part in parts])
        return Typed(MACHINE.make_tuple(self.builder, kind, [part.value for part in parts]), kind)

    def value_of_binop(self, node: ast.BinOp) -> Typed:
        left, right = self.value(node.left), self.value(node.right)
        kind = right.kind if isinstance(left.kind, types.Literal) else left.kind
        x, y, operation = self.as_kind(left, kind), self.as_kind(right, kind), type(node.op)
        if isinstance(kind, types.Float):
            return Typed(getattr(self.builder, FLOAT[operation])(x, y), kind)
        if operation is ast.RShift:
            return Typed((self.builder.ashr if kind.signed else self.builder.lshr)(x, y), kind)
        return Typed(getattr(self.builder, WHOLE[operation])(x, y), kind)

    def value_of_compare(self, node: ast.Compare) -> Typed:
        (operation,), (other,) = node.ops, node.comparators
        left, right, sign = self.value(node.left), self.value(other), COMPARE[type(operation)]
        kind = right.kind if isinstance(left.kind, types.Literal) else left.kind
        x, y = self.as_kind(left, kind), self.as_kind(right, kind)
        if isinstance(kind, types.Float):
            return Typed((self.builder.fcmp_unordered if sign == "!=" else self.builder.fcmp_ordered)(sign, x, y),
                         types.boolean)
        signed = isinstance(kind, types.Integer) and kind.signed
        return Typed((self.builder.icmp_signed if signed else self.builder.icmp_unsigned)(sign, x, y), types.boolean)

    def value_of_boolop(self, node: ast.BoolOp) -> Typed:
        first, *others = [self.value(part).value for part in node.values]
        for other in others:
            first = (self.builder.and_ if isinstance(node.op, ast.And) else self.builder.or_)(first, other)
        return Typed(first, types.boolean)

    def value_of_unaryop(self, node: ast.UnaryOp) -> Typed:
        x = self.value(node.operand)
        if isinstance(node.op, ast.Not):
            return Typed(self.builder.not_(x.value), x.kind)
        return Typed((self.builder.fneg if isinstance(x.kind, types.Float) else self.builder.neg)(x.value), x.kind)

    def value_of_ifexp(self, node: ast.IfExp) -> Typed:
        test, x, y = self.value(node.test), self.value(node.body), self.value(node.orelse)
        return Typed(self.builder.select(test.value, x.value, self.as_kind(y, x.kind)), x.kind)

    def value_of_call(self, node: ast.Call) -> Typed:
        assert isinstance(node.func, ast.Name)
        given = [self.value(argument) for argument in node.args]
        made = operation(NAMES[node.func.id], tuple([argument.kind for argument in given]))
        values = [self.as_kind(argument, kind) for argument, kind in zip(given, made.takes, strict=True)]
        return Typed(made.write(self.builder, values), made.result)

    def as_kind(self, given: Typed, kind: Kind) -> Any:
        return convert(self.builder, given.value, given.kind, kind)
