"""What a plan is, as data: which kernels run in which order on which memory.

A `PlanSpec` holds no code and no address, so it can be stored as JSON and read by another process. Reading it checks
every field: a file that says anything else raises ValueError.

Memory is named by a Ref, ``(space, place)``: ``("input", k)``, ``("output", k)``, ``("arena", byte offset)``,
``("constant", byte offset)``, or ``("private", byte offset)`` in memory that each thread has of its own. An argument
that is text is the key of another kernel: its address is passed. On a GPU there are also ``("table", k)``, the numbers and
addresses of `tables[k]` in device memory, and ``("error", 0)``, the error word of the entry.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import prod
from typing import Any

from jitgrad import dtypes, ops
from jitgrad.dtypes import DType
from jitgrad.ir.graph import Graph, Where
from jitgrad.ir.op import REGISTRY
from jitgrad.ir.parse import parse_graph
from jitgrad.ir.types import TensorType, parse_type
from jitgrad.ops.contraction import convolution_output_shape
from jitgrad.products import (
    ACTIVATIONS,
    ATTENDED,
    ATTENDED_DTYPES,
    CONVOLVED_DTYPES,
    DTYPES,
    KINDS,
    SLACK,
    WORKSPACE,
    Attended,
    Convolved,
    Laid,
    Product,
)

Ref = tuple[str, int]

@dataclass(frozen=True, slots=True)
class Boxes:
    """An argument of a GPU kernel that tells the copy engine of a matrix of 16-bit elements, `start` bytes behind `ref`:
    elements of a line and lines, bytes from line to line, elements and lines of a box."""

    ref: Ref
    start: int
    sizes: tuple[int, int]
    pitch: int
    box: tuple[int, int]


Argument = Ref | Boxes | int | str
SPACES = ("input", "output", "arena", "constant", "private", "table", "error")
OPS = ops                                                   # importing them is what fills the registry
_KEYS = {Product: "product", Convolved: "convolution", Attended: "attention"}       # of what a library is asked for, in JSON
_KEY = re.compile(r"[0-9a-f]{16,64}\Z")


@dataclass(frozen=True, slots=True)
class Output:
    """A result. `source` is ("output", its own index) for fresh memory, another output's Ref to share that one's
    memory, or the Ref of an input: then that very input is returned."""

    type: TensorType
    source: Ref


@dataclass(frozen=True, slots=True)
class HostCall:
    """An entry that Python carries out: the NumPy form of the op called `op`."""

    op: str
    attrs: Mapping[str, Any]
    inputs: tuple[tuple[Ref, TensorType], ...]
    outputs: tuple[tuple[Ref, TensorType], ...]


@dataclass(frozen=True, slots=True)
class LibraryCall:
    """An entry that a library carries out. `operands`: the places of operands, results, the workspace and, where a product
    has one, the bias."""

    asked: Product | Convolved | Attended
    operands: tuple[Ref, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One step: a kernel (by its cache key) for `items` work items with `arguments`, a host call, or a call of a library. On
    a GPU `items` are blocks of `threads` threads with `dynamic` bytes of shared memory beside what their code says, and
    numbers among the arguments are int32, int64 where `wide`. Neighbours of one `group` run side by side, cut into so many
    `pieces` each; 0 is none. `node` is the position of a node in the graph as traced: its line is that of the entry. The
    line itself is no part of a plan, as equal graphs have one plan."""

    name: str
    kernel: str | None
    host: HostCall | None
    items: int
    arguments: tuple[Argument, ...]
    node: int | None = None
    threads: int = 0
    wide: bool = False
    library: LibraryCall | None = None
    dynamic: int = 0
    group: int = 0
    pieces: int = 1

    def line(self, lines: Sequence[Where]) -> Where:
        """Its line, of those of the graph as traced."""
        return lines[self.node] if self.node is not None and self.node < len(lines) else None


@dataclass(frozen=True, slots=True)
class Decision:
    """What was chosen for a step after measuring (`jitgrad.tuning`). `key` says for which steps, `title` names
    them, `answers` are (question, candidate) as far as they are not the usual ones, `gain` is how
    many times as fast the step became, `candidates` and `seconds` what measuring took."""

    key: str
    title: str
    answers: tuple[tuple[str, str], ...]
    gain: float
    candidates: int
    seconds: float

    def __str__(self) -> str:
        """``matmul(f32[64, 10], f32[10, 64]): right operand: packed; 1.08 times as fast``"""
        answers = ", ".join(f"{question}: {answer}" for question, answer in self.answers)
        return f"{self.title}: {answers or 'as usual'}; {self.gain:.2f} times as fast"

    def to_data(self) -> dict[str, Any]:
        """As data for JSON, from which `from_data` makes an equal one."""
        return {"key": self.key, "title": self.title, "answers": dict(self.answers), "gain": self.gain,
                "candidates": self.candidates, "seconds": self.seconds}

    @staticmethod
    def from_data(data: Any) -> Decision:
        """The inverse of `to_data`; ValueError for anything else."""
        try:
            answers = tuple(sorted([(_read(q, str), _read(a, str)) for q, a in data["answers"].items()]))
            return Decision(_read(data["key"], str), _read(data["title"], str), answers, _read(data["gain"], float),
                            _read(data["candidates"], int), _read(data["seconds"], float))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a decision: {error!r}") from None


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """A plan. `written` are the inputs that it overwrites in place, `arena` is in bytes, `sources` the kernels' text
    by key, with its comments, `private` the bytes that each thread needs beside the arena, `choices` what was measured
    before it was made, `tables` what kernels of a GPU look up in its memory: numbers, and Refs that stand for addresses."""

    inputs: tuple[TensorType, ...]
    outputs: tuple[Output, ...]
    written: tuple[int, ...]
    constants: bytes
    arena: int
    entries: tuple[Entry, ...]
    sources: Mapping[str, str] = field(default_factory=dict)
    private: int = 0
    choices: tuple[Decision, ...] = ()
    tables: tuple[tuple[Ref | int, ...], ...] = ()

    def __post_init__(self) -> None:
        _check_spec(self)

    @property
    def kernels(self) -> dict[str, str]:
        """The keys of the kernels that it needs, with a name for each."""
        called = {a: f"part of {entry.name}" for entry in self.entries for a in entry.arguments if isinstance(a, str)}
        return called | {entry.kernel: entry.name for entry in self.entries if entry.kernel is not None}

    @property
    def is_grouped(self) -> bool:
        """Whether entries run side by side."""
        return any(entry.group for entry in self.entries)

    def to_json(self) -> str:
        """The plan as JSON text, from which `from_json` makes an equal one."""
        return json.dumps({
            "inputs": [str(t) for t in self.inputs],
            "outputs": [[str(o.type), list(o.source)] for o in self.outputs],
            "written": list(self.written),
            "constants": base64.b64encode(self.constants).decode(),
            "arena": self.arena,
            "entries": [_write_entry(entry) for entry in self.entries],
            "sources": dict(self.sources),
            "private": self.private,
            "choices": [decision.to_data() for decision in self.choices],
            "tables": [[e if isinstance(e, int) else list(e) for e in table] for table in self.tables],
        })

    @staticmethod
    def from_json(text: str) -> PlanSpec:
        """The plan that `text` describes; ValueError for anything else than the output of `to_json`."""
        try:
            return _read_spec(json.loads(text))
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a plan: {error!r}") from None


# Checks

def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(f"not a plan: {problem}")


def _check_spec(spec: PlanSpec) -> None:
    _require(all(0 <= k < len(spec.inputs) for k in spec.written), "an input is written that does not exist")
    _require(min(spec.arena, spec.private) >= 0, "the arena's size is negative")
    check_ref = _ref_checker(spec)
    for output in spec.outputs:
        check_ref(output.source, output.type.nbytes)
        if output.source[0] == "output":
            own = spec.outputs[output.source[1]]
            _require(own.source == output.source, "an output shares memory with one that has none")
            _require(own.type.nbytes == output.type.nbytes, "outputs that share memory differ in size")
    for entry in spec.entries:
        _check_entry(entry, check_ref)
    for element in [e for table in spec.tables for e in table if not isinstance(e, int)]:
        check_ref(element, 0)


def _check_entry(entry: Entry, check_ref: Callable[[Ref, int], None]) -> None:
    kinds = sum(kind is not None for kind in (entry.kernel, entry.host, entry.library))
    _require(kinds == 1, f"{entry.name}: neither kernel nor call, or several")
    _require(0 <= entry.items < 1 << 31, f"{entry.name}: {entry.items} items")
    _require(entry.node is None or entry.node >= 0, f"{entry.name}: node {entry.node}")
    _require(0 <= entry.threads <= 1024, f"{entry.name}: blocks of {entry.threads} threads")
    _require(entry.group == 0 or (entry.group > 0 and entry.kernel is not None), f"{entry.name}: group {entry.group}")
    _require(1 <= entry.pieces <= max(entry.items, 1), f"{entry.name}: {entry.pieces} pieces of {entry.items} items")
    _require(0 <= entry.dynamic < 1 << 20, f"{entry.name}: {entry.dynamic} bytes of shared memory")
    _require(entry.kernel is None or bool(_KEY.match(entry.kernel)), f"{entry.name}: a kernel's key is hexadecimal")
    for argument in entry.arguments:                        # thousands: what to say of one is made up where it is wrong
        if isinstance(argument, int):
            if not -(1 << 63) <= argument < 1 << 63:
                _require(False, f"{entry.name}: {argument} is no int64")
        elif isinstance(argument, str):
            _require(bool(_KEY.match(argument)), f"{entry.name}: a kernel's key is hexadecimal")
        elif isinstance(argument, Boxes):
            _require(min(argument.start, argument.pitch, *argument.sizes, *argument.box) >= 0, f"{entry.name}: {argument}")
            check_ref(argument.ref, argument.start + argument.pitch * (argument.sizes[1] - 1) + 2 * argument.sizes[0])
        else:
            check_ref(argument, 0)
    if entry.host is not None:
        _require(entry.host.op in REGISTRY, f"there is no op {entry.host.op!r}")
        for ref, type in entry.host.inputs + entry.host.outputs:
            check_ref(ref, type.nbytes)
    if entry.library is not None:
        _check_call(entry.library, check_ref)


def _check_call(call: LibraryCall, check_ref: Callable[[Ref, int], None]) -> None:
    """What is read and written exists."""
    needed = _BYTES[type(call.asked)](call.asked)
    _require(len(call.operands) == len(needed), "operands of a library's call are missing")
    for ref, nbytes in zip(call.operands, needed, strict=True):
        check_ref(ref, nbytes)


def _bytes_of_product(product: Product) -> tuple[int, ...]:
    """The bytes that each operand of a product must have; ValueError for one that does not exist."""
    _require(min(product.m, product.n, product.k, product.batch) > 0, "a product of nothing")
    _require(product.dtype in DTYPES and product.activation in ACTIVATIONS, "a product that no library knows")
    _require(min(x for laid in (product.a, product.b) for x in (laid.pitch, laid.stride + 1, laid.first + 1)) > 0,
             "a factor that begins before its memory")
    batch, m, n, k = product.batch, product.m, product.n, product.k
    item = dtypes.BY_SHORT[product.dtype].itemsize
    bias = (n * item,) * product.bias
    return (product.a.end(batch, m, k) * item, product.b.end(batch, k, n) * item, batch * m * n * item, WORKSPACE + SLACK,
            *bias)


def _bytes_of_convolved(asked: Convolved) -> tuple[int, ...]:
    """The same for a convolution."""
    image, weights, axes = asked.image, asked.weights, (asked.stride, asked.low, asked.high, asked.dilation)
    _require(asked.kind in KINDS and asked.dtype in CONVOLVED_DTYPES, "a convolution that no library knows")
    _require(len(image) == len(weights) == 2 + len(asked.stride) and 1 <= len(asked.stride) <= 3
             and {len(sizes) for sizes in axes} == {len(asked.stride)}, "a convolution of something else than images")
    _require(min(*image, *weights, *asked.result, *asked.stride, *asked.dilation, *[p + 1 for p in asked.low + asked.high],
                 asked.workspace + 1) > 0, "a convolution of nothing")
    padding = tuple(zip(asked.low, asked.high, strict=True))
    shape = convolution_output_shape(image, weights, asked.stride, padding, asked.dilation)
    _require(image[1] % weights[1] == 0 == weights[0] % asked.groups and shape == asked.result,
             "shapes of a convolution that do not fit")
    item = dtypes.BY_SHORT[asked.dtype].itemsize
    return (*[prod(sizes) * item for sizes in asked.shapes], asked.workspace + SLACK)


def _bytes_of_attended(asked: Attended) -> tuple[int, ...]:
    """The same for attention."""
    _require(asked.kind in ATTENDED and asked.dtype in ATTENDED_DTYPES, "attention that no library knows")
    _require(min(asked.heads, asked.groups, asked.queries, asked.keys, asked.width, asked.values, asked.workspace + 1) > 0,
             "attention to nothing")
    _require(asked.heads % asked.groups == 0, "heads of attention that do not fit")
    matrices = sum([len(shape) == 3 for shape in asked.shapes])
    _require(len(asked.laid) in (0, 5 * matrices) and min(asked.laid, default=0) >= 0
             and all(inner > 0 for inner in asked.laid[1::5]) and asked.together > 0, "attention to what lies nowhere")
    item = dtypes.BY_SHORT[asked.dtype].itemsize
    sizes = [end * (4 if shape == asked.sums else item) for end, shape in zip(asked.ends, asked.shapes, strict=True)]
    return (*sizes, asked.workspace + SLACK)


_BYTES: dict[type, Callable[[Any], tuple[int, ...]]] = {
    Product: _bytes_of_product, Convolved: _bytes_of_convolved, Attended: _bytes_of_attended}


def _ref_checker(spec: PlanSpec) -> Callable[[Ref, int], None]:
    """A function that checks that `nbytes` at a Ref exist."""
    sizes = {"arena": spec.arena, "constant": len(spec.constants), "private": spec.private, "table": len(spec.tables),
             "error": 1}
    values = {"input": [t.nbytes for t in spec.inputs], "output": [o.type.nbytes for o in spec.outputs]}

    def check(ref: Ref, nbytes: int) -> None:
        space, place = ref
        if space not in SPACES or place < 0:
            _require(False, f"{ref} is no place")
        known = values.get(space)
        if place + nbytes > sizes[space] if known is None else place >= len(known) or nbytes > known[place]:
            _require(False, f"{nbytes} bytes at {ref}")

    return check


# JSON

def _write_entry(entry: Entry) -> dict[str, Any]:
    host = entry.host and {"op": entry.host.op, "attrs": write_attr(dict(entry.host.attrs)),
                           "inputs": [[list(r), str(t)] for r, t in entry.host.inputs],
                           "outputs": [[list(r), str(t)] for r, t in entry.host.outputs]}
    return {"name": entry.name, "kernel": entry.kernel, "host": host, "items": entry.items,
            "arguments": [_write_argument(a) for a in entry.arguments],
            "node": entry.node, "threads": entry.threads, "wide": entry.wide,
            "library": entry.library and {_KEYS[type(entry.library.asked)]: asdict(entry.library.asked),
                                          "operands": [list(ref) for ref in entry.library.operands]},
            "dynamic": entry.dynamic, "group": entry.group, "pieces": entry.pieces}


def _write_argument(argument: Argument) -> Any:
    if isinstance(argument, Boxes):
        return {"ref": list(argument.ref), "start": argument.start, "sizes": list(argument.sizes), "pitch": argument.pitch,
                "box": list(argument.box)}
    return argument if isinstance(argument, (int, str)) else list(argument)


def _read_argument(data: Any) -> Argument:
    if type(data) is dict:
        sizes, box = [(_read(data[key][0], int), _read(data[key][1], int)) for key in ("sizes", "box")]
        return Boxes(_read_ref(data["ref"]), _read(data["start"], int), sizes, _read(data["pitch"], int), box)
    return data if type(data) in (int, str) else _read_ref(data)


def _read_spec(data: Any) -> PlanSpec:
    return PlanSpec(
        tuple([parse_type(t) for t in data["inputs"]]),
        tuple([Output(parse_type(t), _read_ref(ref)) for t, ref in data["outputs"]]),
        tuple([_read(k, int) for k in data["written"]]),
        base64.b64decode(data["constants"], validate=True),
        _read(data["arena"], int),
        tuple([_read_entry(entry) for entry in data["entries"]]),
        {_read(key, str): _read(text, str) for key, text in data["sources"].items()}, _read(data["private"], int),
        tuple([Decision.from_data(decision) for decision in data["choices"]]),
        tuple([tuple([e if type(e) is int else _read_ref(e) for e in table]) for table in data["tables"]]))


def _read_entry(data: Any) -> Entry:
    host = data["host"] and HostCall(_read(data["host"]["op"], str), read_attr(data["host"]["attrs"]),
                                     _read_places(data["host"]["inputs"]), _read_places(data["host"]["outputs"]))
    node = None if data["node"] is None else _read(data["node"], int)
    kernel = None if data["kernel"] is None else _read(data["kernel"], str)
    arguments = tuple([a if type(a) is int else _read_argument(a) for a in data["arguments"]])      # most are numbers
    return Entry(_read(data["name"], str), kernel, host, _read(data["items"], int), arguments, node,
                 _read(data["threads"], int), _read(data["wide"], bool), data["library"] and _read_call(data["library"]),
                 _read(data["dynamic"], int), _read(data["group"], int), _read(data["pieces"], int))


def _read_call(data: Any) -> LibraryCall:
    operands = tuple([_read_ref(ref) for ref in data["operands"]])
    for kind in (Convolved, Attended):
        if _KEYS[kind] in data:
            given = {name: tuple(v) if type(v) is list else v for name, v in data[_KEYS[kind]].items()}
            return LibraryCall(_read_fields(kind, given), operands)
    given = data[_KEYS[Product]]
    return LibraryCall(_read_fields(Product, {**given, "a": _read_fields(Laid, given["a"]),
                                              "b": _read_fields(Laid, given["b"])}), operands)


def _read_fields(kind: type, data: Mapping[str, Any]) -> Any:
    """A dataclass from its fields by name, each of the type that its annotation names."""
    types = {"bool": bool, "int": int, "str": str, "Laid": Laid, "Ints": tuple}
    given = {f.name: _read(data[f.name], types[str(f.type)]) for f in fields(kind)}
    for value in given.values():
        _require(type(value) is not tuple or all(type(size) is int for size in value), f"{value!r} are no sizes")
    return kind(**given)


def _read(value: Any, kind: type) -> Any:
    _require(type(value) is kind, f"{value!r} is no {kind.__name__}")
    return value


def _read_ref(data: Any) -> Ref:
    space, place = data
    if type(space) is not str or type(place) is not int:
        _require(False, f"{data!r} is no place")
    return space, place


def _read_places(data: Any) -> tuple[tuple[Ref, TensorType], ...]:
    return tuple([(_read_ref(ref), parse_type(type)) for ref, type in data])


def write_attr(value: Any) -> Any:
    """An attribute as JSON data: None, bool, int and str as they are, everything else as ``{kind: content}``."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, DType):
        return {"dtype": value.short}
    if isinstance(value, TensorType):
        return {"type": str(value)}
    if isinstance(value, Graph):
        return {"graph": str(value)}
    if isinstance(value, (tuple, list)):
        return {"tuple": [write_attr(v) for v in value]}
    if isinstance(value, Mapping):
        return {"dict": {_read(k, str): write_attr(v) for k, v in value.items()}}
    raise TypeError(f"an attribute of type {type(value).__name__} cannot be stored with a plan")


def read_attr(data: Any) -> Any:
    """The inverse of `write_attr`."""
    if data is None or isinstance(data, (bool, int, str)):
        return data
    ((kind, content),) = data.items()
    _require(kind in _READERS, f"an attribute of kind {kind!r}")
    return _READERS[kind](content)


_READERS: dict[str, Callable[[Any], Any]] = {
    "float": float.fromhex,
    "complex": lambda pair: complex(float.fromhex(pair[0]), float.fromhex(pair[1])),
    "dtype": lambda short: dtypes.BY_SHORT[short],
    "type": parse_type,
    "graph": parse_graph,
    "tuple": lambda items: tuple([read_attr(v) for v in items]),
    "dict": lambda items: {k: read_attr(v) for k, v in items.items()},
}
