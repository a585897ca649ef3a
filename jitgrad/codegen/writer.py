"""Writes one kernel: loops are opened and closed, values are asked for, statements appear where they belong.

What goes in: a region's body, analysed (`Region`), and the loops that a template opens. What comes out: a `Kernel` and
its arguments. A value asked for inside of loops is computed in the outermost loop that knows everything it needs, so
0-d operands and loop-invariant parts stand in front of loops by themselves.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from jitgrad import dtypes
from jitgrad.codegen.kernel import Accumulate, Buffer, Kernel, Let, Load, Loop, Operand, Statement, Store, When
from jitgrad.dtypes import DType
from jitgrad.ir.axes import Axes, Dim, Index, Strided, atoms_of, atoms_of_all, is_plain, source_index
from jitgrad.ir.graph import Node, Value
from jitgrad.ir.types import TensorType

Block = TypeVar("Block", Loop, When)

COMBINE = {"{0} + {1}": "add", "{0} * {1}": "mul", "maximum({0}, {1})": "max", "minimum({0}, {1})": "min"}
BOOL_COMBINE = {"add": "{0} | {1}", "max": "{0} | {1}", "mul": "{0} & {1}", "min": "{0} & {1}"}

DIVISION = "{1} == 0", "fail(args, 2, 0, 0)"
CHECKS = {"check_index": ("{0} < 0 or {0} >= {1}", "fail(args, 1, 0, {0})")}
"""When an op that may fail fails, and how a kernel says so."""


def compute_dtype(dtype: DType) -> DType:
    """What a value is while it is in a kernel: 16-bit floats are float32."""
    return dtypes.float32 if dtype in (dtypes.float16, dtypes.bfloat16) else dtype


@dataclass(frozen=True)
class Axis:
    """One loop: the atoms that it runs along (collapsed), the name of its variable and of its size."""

    atoms: tuple[int, ...]
    name: str
    size: str


@dataclass
class Level:
    """An open loop: its statements, and the values known in it."""

    body: list[Statement]
    known: dict[object, str] = field(default_factory=dict)


class Writer:
    """One kernel in the making. `buffers` says which memory holds a region's inputs and outputs."""

    def __init__(self, axes: Axes, producers: dict[Value, Node], buffers: dict[Value, Buffer]):
        self.axes = axes
        self.producers = producers
        self.buffers = buffers
        self.operands: dict[Buffer, Operand] = {}
        self.tables: dict[Buffer, Operand] = {}      # operands whose pointers the kernel takes from a table,
        self.table_level = 0                         # in the loop at this depth
        self.filled_at: dict[Buffer, int] = {}       # memory that the loop at this depth fills: loads stay in there
        self.sizes: dict[str, int] = {}
        self.levels = [Level([])]
        self.loops: dict[int, Axis] = {}            # first atom of each loop known here -> the loop
        self.places: dict[Index, int] = {}          # indices by what they resolve to: a number for each
        self.resolved: dict[object, int] = {}       # those numbers
        self.counter = itertools.count()
        self.pending: list[tuple[Buffer, str, str]] = []

    # ---- arguments and loops

    def operand(self, buffer: Buffer, dtype: DType, type: str) -> str:
        """The name of the pointer to `buffer`."""
        if buffer in self.tables:
            return self.tables[buffer].name
        if buffer not in self.operands:
            self.operands[buffer] = Operand(f"p{len(self.operands)}", dtype, type)
        return self.operands[buffer].name

    def size(self, name: str, value: int) -> str:
        self.sizes[name] = value
        return name

    def axis(self, atoms: tuple[int, ...], name: str) -> Axis:
        """A loop along `atoms`; its size becomes an argument."""
        return Axis(atoms, name, self.size(f"n_{name}", self.axes.size(atoms)))

    def open(self, index: str, start: str, stop: str) -> Loop:
        return self.enter(Loop(index, start, stop))

    def enter(self, block: Block) -> Block:
        """Append a loop or a condition; what follows stands inside of it until `close`."""
        self.levels[-1].body.append(block)
        self.levels.append(Level(block.body))
        return block

    def open_axes(self, axes: list[Axis]) -> None:
        """Nested loops along all of each axis."""
        for axis in axes:
            self.open(axis.name, "0", axis.size)
            self.know(axis)

    def know(self, axis: Axis) -> None:
        """The variable of `axis` has a value from here on."""
        self.levels[-1].known[axis.atoms[0]] = axis.name
        for atom in axis.atoms:
            self.loops[atom] = axis

    def close(self, count: int = 1) -> None:
        for _ in range(count):
            self.levels.pop()

    def emit(self, statement: Statement, level: int | None = None) -> None:
        """Append to the innermost loop; at an outer `level`, in front of the loop that is open there."""
        if level is None or level == len(self.levels) - 1:
            self.levels[-1].body.append(statement)
        else:
            self.levels[level].body.insert(len(self.levels[level].body) - 1, statement)

    def let(self, stem: str, value: str) -> str:
        """An int64 variable in the innermost loop."""
        self.emit(Let(stem, None, value))
        return stem

    def fresh(self, stem: str = "v") -> str:
        return f"{stem}{next(self.counter)}"

    # ---- where an index lies in memory

    def variables(self, dim: Dim) -> list[Axis]:
        """The loops that a dimension runs along, outermost first."""
        found: list[Axis] = []
        for atom in self.axes.resolve(atoms_of(dim)):
            axis = self.loops[atom]
            if axis not in found:
                found.append(axis)
        return found

    def position(self, atoms: tuple[int, ...]) -> str:
        """The flat position along `atoms`, in row-major order."""
        text = ""
        for axis in self.variables(atoms):
            text = f"({text}) * {axis.size} + {axis.name}" if " " in text else (
                f"{text} * {axis.size} + {axis.name}" if text else axis.name)
        return text or "0"

    def offset(self, operand: str, type: TensorType, index: Index) -> str:
        """Where the element of a contiguous array at `index` lies."""
        if is_plain(index):
            return self.position(atoms_of_all(index))
        return self._strided_offset(operand, type, index)

    def _strided_offset(self, operand: str, type: TensorType, index: Index) -> str:
        tag = f"{operand}_{sum(name.startswith(f'{operand}_') for name in self.sizes)}"
        start, stride, terms = 0, 1, list[str]()
        for n, dim in zip(reversed(type.shape), reversed(index), strict=True):
            first, step = (dim.start, dim.step) if isinstance(dim, Strided) else (0, 1)
            start += first * stride
            if atoms_of(dim):
                factor = self.size(f"{tag}s{len(terms)}", step * stride)
                terms.append(f"({self.position(atoms_of(dim))}) * {factor}")
            stride *= n
        return " + ".join([self.size(f"{tag}o", start), *reversed(terms)])

    def level_of_atoms(self, atoms: tuple[int, ...]) -> int:
        """The outermost level at which the loops of all `atoms` are open."""
        return max([self._level_of(self.loops[a].atoms[0]) for a in self.axes.resolve(atoms)], default=0)

    def _level_of(self, key: object) -> int:
        for k in range(len(self.levels) - 1, -1, -1):
            if key in self.levels[k].known:
                return k
        raise KeyError(key)

    # ---- values

    def key(self, value: Value, index: Index) -> object:
        """What a value at an index is known by. Loops do not change any more, so indices are resolved once."""
        place = self.places.get(index)
        if place is None:
            resolved = tuple([(self.axes.resolve(dim.atoms), dim.start, dim.step) if isinstance(dim, Strided)
                              else self.axes.resolve(dim) for dim in index])
            place = self.places[index] = self.resolved.setdefault(resolved, len(self.resolved))
        return value, place

    def find(self, key: object) -> tuple[str, int] | None:
        for k in range(len(self.levels) - 1, -1, -1):
            name = self.levels[k].known.get(key)
            if name is not None:
                return name, k
        return None

    def bind(self, value: Value, index: Index, name: str) -> None:
        """`value` at `index` is the variable `name`, as long as the innermost loop is open."""
        self.levels[-1].known[self.key(value, index)] = name

    def evaluate(self, value: Value, index: Index) -> str:
        """The name of `value` at `index`, computed where it is not known yet."""
        stack = [(value, index)]
        while stack:
            wanted = stack[-1]
            found = self.find(self.key(*wanted))
            if found is None:
                needs = self._needs(*wanted)
                known = [self.find(self.key(*need)) for need in needs]
                if None in known:
                    stack.extend([need for need, have in zip(needs, known, strict=True) if have is None])
                    continue
                found = self._compute(*wanted, [have for have in known if have])
            stack.pop()
        assert found is not None
        return found[0]

    def _needs(self, value: Value, index: Index) -> list[tuple[Value, Index]]:
        node = self.producers.get(value)
        if node is None:
            return []
        if node.op.kind == "movement":
            source = source_index(self.axes, node, index)
            assert source is not None
            return [(node.inputs[0], source)]
        assert node.op.kind != "reduction", f"{node.op.name} is read before its loop has run"
        return [(v, index if v.shape else ()) for v in node.inputs]

    def _compute(self, value: Value, index: Index, operands: list[tuple[str, int]]) -> tuple[str, int]:
        """Add the statement of `value`; its name and level. `operands` are those of what its node reads."""
        node = self.producers.get(value)
        names = [name for name, _ in operands]
        level = max([level for _, level in operands], default=0)
        if node is None:
            name, level = self._load(value, index)
        elif node.op.kind == "movement":
            name = names[0]
        else:
            atoms = self.axes.flat(index) if node.op.kind == "source" else ()
            level = max(level, self.level_of_atoms(atoms))
            name = self._apply(node, index, names, level)
        self.levels[level].known[self.key(value, index)] = name
        return name, level

    def _load(self, value: Value, index: Index) -> tuple[str, int]:
        operand = self.operand(self.buffers[value], value.dtype, str(value.type))
        level = max(self.level_of_atoms(self.axes.flat(index)), self.filled_at.get(self.buffers[value], 0))
        if self.buffers[value] in self.tables:
            level = max(level, self.table_level)
        name = self.fresh()
        self.emit(Load(name, operand, self.offset(operand, value.type, index)), level)
        return name, level

    def _apply(self, node: Node, index: Index, names: list[str], level: int) -> str:
        name = self.fresh()
        dtype = compute_dtype(node.output.dtype)
        if node.op.name == "iota":
            text = self.position(atoms_of(index[node.attrs["axis"]]))
        elif node.op.name == "random_bits":
            text = f"random_bits_lane({names[0]}, {names[1]}, {self.position(self.axes.flat(index))})"
        else:
            self._check(node, names, level)
            text = spell(node, names)
        self.emit(Let(name, dtype, text, node.where, node.op.name), level)
        return name

    def _check(self, node: Node, names: list[str], level: int) -> None:
        """What cannot be computed is reported; the statement itself then gives a harmless value."""
        if "may-fail" in node.op.effects and node.output.dtype.is_integer:
            condition, report = CHECKS.get(node.op.name, DIVISION)
            self.emit(When(condition.format(*names), [Let("_", None, report.format(*names))]), level)

    def store(self, buffer: Buffer, type: TensorType, index: Index, name: str) -> None:
        """Write when `flush` is called: a kernel reads all operands at an index before it writes there."""
        operand = self.operand(buffer, type.dtype, str(type))
        self.store_at(buffer, type, self.offset(operand, type, index), name)

    def store_at(self, buffer: Buffer, type: TensorType, place: str, name: str) -> None:
        """`store`, at a place that is known as text."""
        self.operand(buffer, type.dtype, str(type))
        self.pending.append((buffer, place, name))

    def load(self, buffer: Buffer, type: TensorType, place: str) -> str:
        """Read memory that is no value of the region, in the innermost loop."""
        name = self.fresh()
        self.emit(Load(name, self.operand(buffer, type.dtype, str(type)), place))
        return name

    def flush(self) -> None:
        for buffer, place, name in self.pending:
            self.emit(Store((self.tables.get(buffer) or self.operands[buffer]).name, place, name))
        self.pending.clear()

    # ---- reductions

    def start(self, node: Node) -> str:
        """A variable that accumulates the reduction `node`, with the value of an empty one."""
        name = self.fresh("acc")
        self.emit(Let(name, compute_dtype(node.inputs[0].dtype), neutral(node), node.where, node.op.name))
        return name

    def accumulate(self, node: Node, accumulator: str, value: str) -> None:
        how, dtype = combine(node), compute_dtype(node.inputs[0].dtype)
        if dtype is dtypes.bool_:
            self.emit(Let(accumulator, dtype, BOOL_COMBINE[how].format(accumulator, value)))
        else:
            self.emit(Accumulate(accumulator, how, value))

    def start_position(self, node: Node) -> tuple[str, str]:
        """Variables for argmax or argmin: the best value so far and where it is."""
        best, place = self.fresh("best"), self.fresh("place")
        self.emit(Let(best, compute_dtype(node.inputs[0].dtype), neutral(node), node.where, node.op.name))
        self.emit(Let(place, dtypes.int64, "0"))
        return best, place

    def accumulate_position(self, node: Node, names: tuple[str, ...], value: str, position: str) -> None:
        """A value that is not beyond `best` changes nothing, so the first of equals stays; nan is beyond all."""
        best, place = names
        relation = "<=" if node.op.name == "argmax" else ">="
        better = self.fresh("better")
        self.emit(Let(better, dtypes.bool_, f"{best} == {best} and not {value} {relation} {best}"))
        self.emit(Let(place, dtypes.int64, f"{position} if {better} else {place}"))
        self.emit(Let(best, compute_dtype(node.inputs[0].dtype), f"{value} if {better} else {best}"))

    def kernel(self, name: str) -> tuple[Kernel, tuple[Buffer | int, ...]]:
        """The finished kernel, and its arguments in order."""
        made = Kernel(name, tuple(self.operands.values()), tuple(self.sizes), self.levels[0].body,
                      tuple(self.tables.values()))
        return made, (*self.operands, *self.sizes.values())


def spell(node: Node, names: list[str]) -> str:
    """An elementwise node over named operands, as its op's record says."""
    template = node.op.spell
    assert template is not None, f"{node.op.name} has no scalar form"
    return template.format(*names, **node.attrs) if "{" in template else f"{template}({', '.join(names)})"


def combine(node: Node) -> str:
    """How a reduction joins two values: add, mul, max or min."""
    return COMBINE[node.op.spell or ""]


def is_position(node: Node) -> bool:
    """True for argmax and argmin."""
    return node.op.kind == "reduction" and node.op.spell is None


def neutral(node: Node) -> str:
    """What a reduction starts from."""
    dtype = compute_dtype(node.inputs[0].dtype)
    if node.op.identity is not None:
        return str(bool(node.op.identity)) if dtype is dtypes.bool_ else str(node.op.identity)
    lowest = node.op.name in ("max", "argmax")
    if dtype.is_floating_point:
        return "-1e999" if lowest else "1e999"
    if dtype is dtypes.bool_:
        return str(not lowest)
    limits = np.iinfo(dtype.numpy)
    return str(limits.min if lowest else limits.max)
