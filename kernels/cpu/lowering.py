"""A function and the types of its arguments -> LLVM IR, unoptimized, statement by statement.

Variables that are given something in one place and read behind it are values; the others are memory, which LLVM turns into
registers. Conditions become branches, and a loop over a range counts its rounds.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import alloca_once

from jitgrad.kernels.cpu.contexts import MACHINE, Kind, convert
from jitgrad.kernels.cpu.inference import Types


class Form:
    """A function for certain types of its arguments: its text and the types in it. `name` is that of the LLVM function."""

    def __init__(self, tree: ast.FunctionDef, arguments: tuple[Kind, ...], names: Mapping[str, Any], name: str):
        self.tree, self.arguments, self.name = tree, arguments, name
        self.types = Types(tree, arguments, names)
        self.result = self.types.result

    def write(self, module: ir.Module, attributes: Sequence[str] = ()) -> ir.Function:
        """The LLVM function in `module`, which is written when it is first asked for."""
        known = module.globals.get(self.name)
        if known is not None:
            return known
        result = ir.VoidType() if self.result == types.none else MACHINE.get_value_type(self.result)
        kind = ir.FunctionType(result, [MACHINE.get_value_type(a) for a in self.arguments])
        function = ir.Function(module, kind, self.name)
        for attribute in attributes:
            function.attributes.add(attribute)
        _Writer(self, function).body()
        return function


@cache
def form_of(function: Callable[..., Any], arguments: tuple[Kind, ...]) -> Form:
    """The form of a Python function, from its source."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    names = {**vars(builtins), **function.__globals__}
    name = f"{function.__module__}.{function.__qualname__}({', '.join(map(str, arguments))})"
    return Form(tree, arguments, names, name)


class _Writer:
    """One function in the making. `loops`: where ``continue`` and ``break`` go."""

    def __init__(self, form: Form, function: ir.Function):
        self.types, self.tree, self.result = form.types, form.tree, form.result
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))
        self.values: dict[str, ir.Value] = {}
        self.slots: dict[str, ir.Value] = {}
        self.loops: list[tuple[ir.Block, ir.Block]] = []
        for name, value in zip(self.types.arguments, function.args, strict=True):
            self.keep(name, value)

    def body(self) -> None:
        self.block(self.tree.body)
        if not self.builder.block.is_terminated:
            if self.result == types.none:
                self.builder.ret_void()
            else:
                self.builder.unreachable()

    # ---- statements

    def block(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            if self.builder.block.is_terminated:                         # what follows is never reached
                return
            getattr(self, f"write_{type(statement).__name__.lower()}")(statement)

    def write_expr(self, statement: ast.Expr) -> None:
        if not isinstance(statement.value, ast.Constant):
            self.value(statement.value)

    def write_pass(self, statement: ast.Pass) -> None:
        pass

    def write_continue(self, statement: ast.Continue) -> None:
        self.builder.branch(self.loops[-1][0])

    def write_break(self, statement: ast.Break) -> None:
        self.builder.branch(self.loops[-1][1])

    def write_return(self, statement: ast.Return) -> None:
        if statement.value is None or self.result == types.none:
            self.builder.ret_void()
        else:
            self.builder.ret(self.value_as(statement.value, self.result))

    def write_assign(self, statement: ast.Assign) -> None:
        (target,), given = statement.targets, statement.value
        if isinstance(target, ast.Tuple) and isinstance(given, ast.Tuple):
            found = [(self.value(part), self.types.kinds[part]) for part in given.elts]
            for part, (value, kind) in zip(target.elts, found, strict=True):
                self.give(part, value, kind)
        else:
            self.give(target, self.value(given), self.types.kinds[given])

    def write_augassign(self, statement: ast.AugAssign) -> None:
        target, made = statement.target, self.types.operations[statement]
        if isinstance(target, ast.Name):
            before, kind = self.variable(target.id), self.types.variables[target.id]
        else:
            before, kind = self.value(target), self.types.kinds[target]
        given = self.value(statement.value)
        operands = zip((before, given), (kind, self.types.kinds[statement.value]), made.takes, strict=True)
        self.give(target, made.write(self.builder, [convert(self.builder, *o) for o in operands]), made.result)

    def give(self, target: ast.expr, value: ir.Value, kind: Kind) -> None:
        """`target` gets `value`."""
        if isinstance(target, ast.Tuple):
            for k, (part, own) in enumerate(zip(target.elts, list(kind), strict=True)):
                self.give(part, self.builder.extract_value(value, k), own)
        elif isinstance(target, ast.Subscript):
            element = self.types.kinds[target.value].dtype
            place = self.place(target)
            self.builder.store(convert(self.builder, value, kind, element), place)
        else:
            assert isinstance(target, ast.Name)
            self.keep(target.id, convert(self.builder, value, kind, self.types.variables[target.id]))

    def keep(self, name: str, value: ir.Value) -> None:
        """The variable has this value from now on, in its own type."""
        if name not in self.types.in_memory:
            self.values[name] = value
            return
        if name not in self.slots:
            self.slots[name] = alloca_once(self.builder, value.type, name=name)
        self.builder.store(value, self.slots[name])

    def write_if(self, statement: ast.If) -> None:
        yes, no, behind = [self.builder.append_basic_block(name) for name in ("then", "else", "behind")]
        self.branch(statement.test, yes, no)
        for place, statements in ((yes, statement.body), (no, statement.orelse)):
            self.builder.position_at_end(place)
            self.block(statements)
            self.go_on(behind)

    def go_on(self, block: ir.Block) -> None:
        """To `block`, unless the code has gone elsewhere; what follows is written there."""
        if not self.builder.block.is_terminated:
            self.builder.branch(block)
        self.builder.position_at_end(block)

    def write_while(self, statement: ast.While) -> None:
        head, inside, behind = [self.builder.append_basic_block(name) for name in ("while", "inside", "behind")]
        self.go_on(head)
        self.branch(statement.test, inside, behind)
        self.loop(statement.body, inside, head, behind)
        if not self.builder.block.is_terminated:
            self.builder.branch(head)
        self.builder.position_at_end(behind)

    def write_for(self, statement: ast.For) -> None:
        builder, call = self.builder, statement.iter
        assert isinstance(call, ast.Call)
        start, stop, step = self.range_of(call)
        number = start.type
        one, is_plain = number(1), isinstance(start, ir.Constant) and isinstance(step, ir.Constant) and step.constant == 1
        first, last = (start, stop) if is_plain else (number(0), self.rounds(start, stop, step))
        head, inside, following, behind = [builder.append_basic_block(n) for n in ("for", "inside", "next", "behind")]
        before = builder.block
        builder.branch(head)
        builder.position_at_end(head)
        round = builder.phi(number)
        round.add_incoming(first, before)
        compare = builder.icmp_signed if self.types.kinds[call].signed else builder.icmp_unsigned
        builder.cbranch(compare("<", round, last), inside, behind)
        builder.position_at_end(inside)
        item = round if is_plain else builder.add(start, builder.mul(round, step))
        self.give(statement.target, item, self.types.kinds[call])
        self.loop(statement.body, inside, following, behind)
        self.go_on(following)
        round.add_incoming(builder.add(round, one, flags=["nsw"]), following)
        builder.branch(head)
        builder.position_at_end(behind)

    def rounds(self, start: ir.Value, stop: ir.Value, step: ir.Value) -> ir.Value:
        """How many rounds there are from `start` to `stop` by `step`, none where it is 0. LLVM finds this number only where
        it is as good as written down, and does not unroll a loop without."""
        builder = self.builder
        zero, one, minus = [ir.Constant(step.type, n) for n in (0, 1, -1)]
        upwards = builder.icmp_signed(">", step, zero)
        span = builder.sub(builder.add(builder.sub(stop, start), step), builder.select(upwards, one, minus))
        still = builder.icmp_signed("==", step, zero)
        return builder.select(still, zero, builder.sdiv(span, builder.select(still, one, step)))

    def loop(self, statements: Sequence[ast.stmt], inside: ir.Block, following: ir.Block, behind: ir.Block) -> None:
        """The body of a loop, up to its end."""
        self.builder.position_at_end(inside)
        self.loops.append((following, behind))
        self.block(statements)
        self.loops.pop()

    def range_of(self, call: ast.Call) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Start, stop and step."""
        kind = self.types.kinds[call]
        number = MACHINE.get_value_type(kind)
        given = [self.value_as(argument, kind) for argument in call.args]
        if len(given) == 1:
            given.insert(0, ir.Constant(number, 0))
        if len(given) == 2:
            given.append(ir.Constant(number, 1))
        return given[0], given[1], given[2]

    # ---- conditions

    def branch(self, test: ast.expr, yes: ir.Block, no: ir.Block) -> None:
        """To `yes` if `test` holds, else to `no`; of ``and`` and ``or`` the parts are looked at one by one."""
        if isinstance(test, ast.BoolOp):
            *others, last = test.values
            for part in others:
                following = self.builder.append_basic_block("test")
                self.branch(part, *((following, no) if isinstance(test.op, ast.And) else (yes, following)))
                self.builder.position_at_end(following)
            self.branch(last, yes, no)
        elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            self.branch(test.operand, no, yes)
        else:
            self.builder.cbranch(self.value_as(test, types.boolean), yes, no)

    def value_of_compare(self, node: ast.Compare) -> ir.Value:
        """Of a chain all parts are compared: they have no effects."""
        parts = [node.left, *node.comparators]
        values = [self.value(part) for part in parts]
        found = None
        for k in range(len(node.ops)):
            pair = zip(values[k:k + 2], [self.types.kinds[part] for part in parts[k:k + 2]],
                       self.types.operations[node, k].takes, strict=True)
            holds = self.types.operations[node, k].write(self.builder, [convert(self.builder, *p) for p in pair])
            found = holds if found is None else self.builder.and_(found, holds)
        return found

    def value_of_boolop(self, node: ast.BoolOp) -> ir.Value:
        """The first part that settles it, or the last one."""
        kind = self.types.kinds[node]
        found = alloca_once(self.builder, MACHINE.get_value_type(kind))
        behind = self.builder.append_basic_block("settled")
        for part in node.values:
            value = self.value_as(part, kind)
            self.builder.store(value, found)
            following = self.builder.append_basic_block("unsettled") if part is not node.values[-1] else behind
            if following is not behind:
                holds = convert(self.builder, value, kind, types.boolean)
                self.builder.cbranch(holds, *((following, behind) if isinstance(node.op, ast.And) else (behind, following)))
            else:
                self.builder.branch(behind)
            self.builder.position_at_end(following)
        return self.builder.load(found)

    def value_of_ifexp(self, node: ast.IfExp) -> ir.Value:
        kind = self.types.kinds[node]
        yes, no, behind = [self.builder.append_basic_block(name) for name in ("if", "else", "either")]
        self.branch(node.test, yes, no)
        found = []
        for place, part in ((yes, node.body), (no, node.orelse)):
            self.builder.position_at_end(place)
            found.append((self.value_as(part, kind), self.builder.block))
            self.builder.branch(behind)
        self.builder.position_at_end(behind)
        value = self.builder.phi(found[0][0].type)
        for one in found:
            value.add_incoming(*one)
        return value

    # ---- expressions

    def value(self, node: ast.expr) -> ir.Value:
        if node in self.types.constants:
            return self.constant(self.types.constants[node], self.types.kinds[node])
        return getattr(self, f"value_of_{type(node).__name__.lower()}")(node)

    def value_as(self, node: ast.expr, kind: Kind) -> ir.Value:
        return convert(self.builder, self.value(node), self.types.kinds[node], kind)

    def constant(self, value: Any, kind: Kind) -> ir.Value:
        if isinstance(kind, types.Function | types.NumberClass):
            return MACHINE.get_dummy_value()
        return MACHINE.get_constant_generic(self.builder, types.unliteral(kind), value)

    def variable(self, name: str) -> ir.Value:
        return self.values[name] if name in self.values else self.builder.load(self.slots[name])

    def value_of_name(self, node: ast.Name) -> ir.Value:
        if node.id not in self.values and node.id not in self.slots:
            kind = MACHINE.get_value_type(self.types.variables[node.id])
            self.slots[node.id] = alloca_once(self.builder, kind, name=node.id)
        return self.variable(node.id)

    def value_of_tuple(self, node: ast.Tuple) -> ir.Value:
        kinds = list(self.types.kinds[node])
        values = [self.value_as(part, kind) for part, kind in zip(node.elts, kinds, strict=True)]
        return MACHINE.make_tuple(self.builder, self.types.kinds[node], values)

    def value_of_binop(self, node: ast.BinOp) -> ir.Value:
        return self.carry_out(node, (node.left, node.right))

    def value_of_unaryop(self, node: ast.UnaryOp) -> ir.Value:
        if isinstance(node.op, ast.Not):
            return self.builder.not_(self.value_as(node.operand, types.boolean))
        return self.carry_out(node, (node.operand,))

    def value_of_call(self, node: ast.Call) -> ir.Value:
        return self.carry_out(node, node.args)

    def carry_out(self, node: ast.expr, operands: Sequence[ast.expr]) -> ir.Value:
        made = self.types.operations[node]
        return made.write(self.builder, [self.value_as(o, kind) for o, kind in zip(operands, made.takes, strict=True)])

    def place(self, node: ast.Subscript) -> ir.Value:
        return self.builder.gep(self.value(node.value), [self.value_as(node.slice, types.int64)])

    def value_of_subscript(self, node: ast.Subscript) -> ir.Value:
        if isinstance(self.types.kinds[node.value], types.CPointer):
            return self.builder.load(self.place(node))
        parts = self.value(node.value)
        if node.slice in self.types.constants:
            return self.builder.extract_value(parts, self.types.constants[node.slice])
        number, found = self.value_as(node.slice, types.int64), self.builder.extract_value(parts, 0)
        for k in range(1, len(self.types.kinds[node.value])):            # a loop is unrolled, and one of them is left
            is_it = self.builder.icmp_signed("==", number, number.type(k))
            found = self.builder.select(is_it, self.builder.extract_value(parts, k), found)
        return found
