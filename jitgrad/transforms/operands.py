"""Graph of regions -> the same, with attention that reads its operands and writes its results where they lie.

Query, key and value are mostly parts of one product, moved to [heads, tokens, width]. What would be a kernel that copies
them, because attention is no part of a region, becomes strides: the movement ops, and the number that multiplies the
query, join attention in a region of the template "attention". A copy that nobody else reads is gone. Likewise the other
way round: the result is written as its reader wants it, where it alone moves it, and gradients that are joined and moved,
to be the gradient of that product, are written there. (What is added to them on the way is 0.0. It makes 0.0 of -0.0,
which such a sum of products is only where all of it underflows.)

The gradient of an LSTM, too, reads an operand as it lies: where that of its cells' states is one number, mostly 0 because
nothing but the last of them is used, it is in memory once, in a region of the template "recurrence". That of any recurrent
layer has no product for the states before the first step in such a region, where nobody needs their gradient. And what
joins parts of arrays copies them from where they lie, in a region of the template "concat".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from jitgrad import ops
from jitgrad.dtypes import DType, bfloat16, float16, float32, float64
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value
from jitgrad.ir.strides import follow, read_heads, steps_through
from jitgrad.ops.attention import heads_of_moved, moved_back, pieces
from jitgrad.ops.recurrence import GRADIENTS
from jitgrad.ops.region import region, region_of
from jitgrad.transforms.dce import eliminate_dead_code

ENOUGH = 8
"""Heads of keys from which all keys of one are in one part: parts have a gradient of the query each."""


def read_where_they_lie(graph: Graph) -> Graph:
    """See the module's text."""
    found = _Results(_recurrences_in_place(_operands_in_place(graph, OUR_KERNELS)), OUR_KERNELS)
    return _pieces_in_place(_Results(found.gradients_in_place(), OUR_KERNELS).results_in_place())


def read_by_a_library(graph: Graph, takes: Callable[[Graph], bool]) -> Graph:
    """The same for a library on GPUs, which reads 16-bit floats and multiplies no query, in the regions that it takes:
    those whose body `takes` agrees to."""
    reader = _Reader((bfloat16, float16), False, takes)
    return _Results(_operands_in_place(graph, reader), reader).results_in_place()


@dataclass(frozen=True, slots=True)
class _Reader:
    """What computes attention where it lies: of which floats, whether it can multiply the query, and of which bodies."""

    dtypes: tuple[DType, ...]
    multiplies: bool
    takes: Callable[[Graph], bool]


OUR_KERNELS = _Reader((float32, float64), True, lambda body: True)


def _operands_in_place(graph: Graph, reader: _Reader) -> Graph:
    producers = graph.producers()
    nodes = tuple([_with_operands(node, producers, reader) for node in graph.nodes])
    return graph if nodes == graph.nodes else eliminate_dead_code(graph.replace(nodes=nodes))


def _with_operands(node: Node, producers: Mapping[Value, Node], reader: _Reader) -> Node:
    """`node`, or the region of it with what moves its operands."""
    if node.op not in (ops.attention, ops.attention_grad) or node.inputs[0].dtype not in reader.dtypes:
        return node
    if not all(v.type.size for v in node.inputs):
        return node
    gradient = node.op is ops.attention_grad
    inner: dict[Node, None] = {}
    for k, value in enumerate(node.inputs[:4 if gradient else 3]):
        moving = _moving(value, producers)
        read = read_heads({v: n for n in moving for v in n.outputs}, value)
        if moving and read is not None and (read.factor is None or (reader.multiplies and k == gradient)):
            inner.update(dict.fromkeys(moving))
    if all(n.op.name == "reshape" for n in inner):
        return node
    made = region_of((*inner, node), node.outputs, "attention", node)
    return made if reader.takes(made.attrs["body"]) else node


def _recurrences_in_place(graph: Graph) -> Graph:
    producers, used = graph.producers(), {*graph.results, *[v for n in graph.nodes for v in n.inputs]}
    nodes = tuple([_as_needed(node, producers, used) for node in graph.nodes])
    return graph if nodes == graph.nodes else eliminate_dead_code(graph.replace(nodes=nodes))


def _as_needed(node: Node, producers: Mapping[Value, Node], used: Set[Value]) -> Node:
    """`node`, or the region of a gradient of a recurrent layer: without gradients of the first states that nobody reads, and
    with what spreads a number out as the gradient of the states of an LSTM's cells."""
    if node.op not in GRADIENTS:
        return node
    outputs = tuple([v for v in node.outputs if v in used or len(v.shape) == 3])
    moving = _spreading(node.inputs[1], producers) if node.op is ops.lstm_grad else []
    return region_of((*moving, node), outputs, "recurrence", node) if moving or outputs != node.outputs else node


def _spreading(value: Value, producers: Mapping[Value, Node]) -> list[Node]:
    """The movement ops that make `value` of one number; none where it is made otherwise."""
    moving = _moving(value, producers)
    spread = moving and all([n.op.name in ("reshape", "broadcast_to") for n in moving])
    return moving if spread and moving[0].inputs[0].type.size == 1 < value.type.size else []


def _pieces_in_place(graph: Graph) -> Graph:
    producers, uses = graph.producers(), graph.uses()
    nodes = tuple([_with_pieces(node, producers, uses) for node in graph.nodes])
    return graph if nodes == graph.nodes else eliminate_dead_code(graph.replace(nodes=nodes))


def _with_pieces(node: Node, producers: Mapping[Value, Node], uses: Mapping[Value, Sequence[Node]]) -> Node:
    """`node`, or the region of a concat with what only moves elements of its operands, to be read by nothing else."""
    if node.op is not ops.concat or node.output.dtype.is_complex:
        return node
    members: dict[Node, None] = {}
    for value in dict.fromkeys(node.inputs):
        moving = _moving(value, producers)
        if moving and len(uses[value]) == 1 and all([n.op.kind == "movement" for n in moving]):
            source = moving[0].inputs[0]
            if steps_through(moving[::-1], source.type, value.type) is not None:
                members.update(dict.fromkeys(moving))
    if all([n.op.name == "reshape" for n in members]):
        return node
    return region_of((*members, node), node.outputs, "concat", node)


@dataclass(frozen=True, slots=True)
class _Tail:
    """What happens to a gradient before it is joined with others: its nodes, and the number that multiplies it."""

    gradient: Value
    nodes: list[Node]
    factor: Value | None


class _Results:
    """One look at what becomes of the gradients in a graph."""

    def __init__(self, graph: Graph, reader: _Reader):
        self.graph, self.reader = graph, reader
        self.producers = graph.producers()
        self.uses = graph.uses()
        self.results = set(graph.results)

    def gradients_in_place(self) -> Graph:
        replaced: dict[Node, tuple[Node, ...]] = {}
        for node in self.graph.nodes:
            if node.op is ops.concat and len(node.inputs) == 3:
                replaced.update(self._joined(node))
        if not replaced:
            return self.graph
        nodes = [new for node in self.graph.nodes for new in replaced.get(node, (node,))]
        return eliminate_dead_code(self.graph.replace(nodes=tuple(nodes)))

    def results_in_place(self) -> Graph:
        replaced: dict[Node, tuple[Node, ...]] = {}
        for node in self.graph.nodes:
            if _primitive(node).op is ops.attention:
                replaced.update(self._moved(node))
        if not replaced:
            return self.graph
        return self.graph.replace(nodes=tuple([new for node in self.graph.nodes for new in replaced.get(node, (node,))]))

    def _moved(self, maker: Node) -> dict[Node, tuple[Node, ...]]:
        """What stands for an attention, for the kernel that moves its result, and for the gradients that read it."""
        out, lse = maker.outputs
        others = [n for n in self.uses[out] if _primitive(n).op is not ops.attention_grad]
        gradients = [n for n in self.uses[out] if n not in others]
        if len(others) != 1 or out in self.results or others[0].op is not region or others[0].attrs["template"] != "map" \
                or any(_primitive(n).inputs.count(out) != 1 or _primitive(n).inputs[-2] is not out for n in gradients):
            return {}
        body: Graph = others[0].attrs["body"]
        (moved, *rest), chain = body.outputs, body.nodes[::-1]
        if rest or others[0].inputs != (out,) or any(n.op not in (ops.permute, ops.reshape) for n in chain) \
                or out.dtype not in self.reader.dtypes or heads_of_moved(chain, out.type, moved.type) is None:
            return {}
        members = (*(maker.attrs["body"].nodes if maker.op is region else (maker,)), *body.nodes)
        made = region_of(members, (moved, lse), "attention", maker)
        behind = {n: _reading_moved(n, chain, out, moved) for n in gradients}
        if not all(self.reader.takes(n.attrs["body"]) for n in (made, *behind.values())):
            return {}
        return {maker: (made,), others[0]: (), **{n: (reading,) for n, reading in behind.items()}}

    def _joined(self, concat: Node) -> dict[Node, tuple[Node, ...]]:
        """What stands for `concat`, or for the kernel that permutes it, and for the node whose gradients it joins, if they
        can be one."""
        tails = [self._tail(v) for v in concat.inputs]
        known = [tail for tail in tails if tail is not None]
        maker = self.producers[known[0].gradient] if known else concat
        if len(known) < len(tails) or not _are_those_of(known, maker):
            return {}
        inner = maker.attrs["body"].nodes if maker.op is region else (maker,)
        members = tuple(dict.fromkeys([*inner, *[n for tail in known for n in tail.nodes], concat]))
        reader = self._only_reader(concat.output)
        if reader is not None and _permutes(reader, concat.output):
            first, *rest = reader.attrs["body"].nodes
            outputs = tuple([v for v in reader.outputs if v is not first.output])
            behind = (region_of(tuple(rest), outputs, reader.attrs["template"], reader),) if rest else ()
            place, made = reader, region_of((*members, first), (first.output,), "attention", maker)
        else:
            place, behind, made = concat, (), region_of(members, concat.outputs, "attention", maker)
        return {maker: (), place: (made, *behind)} if pieces(made.attrs["body"]) is not None else {}

    def _only_reader(self, value: Value) -> Node | None:
        """The node that alone reads `value`."""
        readers = self.uses[value]
        return readers[0] if len(readers) == 1 and value not in self.results else None

    def _tail(self, value: Value) -> _Tail | None:
        """How `value` is made of a gradient; None where it is not, or where others read what lies in between."""
        nodes: list[Node] = []
        factor: Value | None = None
        while self._only_reader(value) is not None:
            node = self.producers.get(value)
            if node is None:
                return None
            if _primitive(node).op is ops.attention_grad:
                return _Tail(value, nodes, factor)
            if node.op.name == "reshape":
                nodes, value = [node, *nodes], node.inputs[0]
                continue
            if node.op is not region or node.attrs["template"] != "map" or len(node.outputs) > 1 or factor is not None:
                return None
            inside = self._plain(node.attrs["body"])
            if inside is None:
                return None
            nodes, (value, factor) = [*node.attrs["body"].nodes, *nodes], inside
        return None

    def _plain(self, body: Graph) -> tuple[Value, Value | None] | None:
        """The input of `body` that its result is, but for where things lie, for zeros added, and for a number that
        multiplies it; and that number."""
        producers = body.producers()
        value, factor = body.outputs[0], None
        while value in producers:
            node = producers[value]
            if node.op in (ops.reshape, ops.permute):
                value = node.inputs[0]
                continue
            if node.op not in (ops.add, ops.mul):
                return None
            numbers = [follow(producers, v)[1] for v in node.inputs]
            side = next((k for k, v in enumerate(numbers) if v.type.size == 1 and v not in producers), None)
            if side is None or (node.op is ops.mul and factor is not None):
                return None
            if node.op is ops.mul:
                factor = numbers[side]
            elif not self._is_zero(numbers[side]):
                return None
            value = node.inputs[1 - side]
        return value, factor

    def _is_zero(self, value: Value) -> bool:
        node = self.producers.get(value)
        return node is not None and node.op is ops.constant and bool(np.all(node.attrs["value"] == 0))


def _permutes(reader: Node, value: Value) -> bool:
    """Whether `reader` is a kernel that permutes `value`, as one of its results, and does nothing else with it."""
    if reader.op is not region:
        return False
    first, *rest = reader.attrs["body"].nodes
    return first.op is ops.permute and first.inputs[0] is value and first.output in reader.outputs \
        and not any(value in n.inputs for n in rest)


def _are_those_of(tails: Sequence[_Tail], maker: Node) -> bool:
    """Whether these are all gradients that `maker` makes, each once, and only the query's is multiplied, if any: by what
    multiplies the query itself."""
    factors = {tail.gradient: tail.factor for tail in tails}
    if set(factors) != set(maker.outputs) or maker.outputs[1].shape[0] < ENOUGH:
        return False
    own, *others = [factors[v] for v in maker.outputs]
    inside = maker.attrs["body"].producers() if maker.op is region else {}
    query = _primitive(maker).inputs[1]
    read = read_heads(inside, query) if query in inside else None
    return all(v is None for v in others) and (own is None or (read is not None and own is read.factor))


def _primitive(node: Node) -> Node:
    """The attention, or the gradient of one, that `node` is the region of; else `node` itself."""
    if node.op is region and node.attrs["template"] == "attention":
        (node,) = [n for n in node.attrs["body"].nodes if n.op in (ops.attention, ops.attention_grad)]
    return node


def _reading_moved(node: Node, chain: Sequence[Node], out: Value, moved: Value) -> Node:
    """The gradient `node`, with attention's result read where it was moved to."""
    builder = GraphBuilder("back")
    whole = builder.input(moved.type)
    with builder:
        x = moved_back(chain, whole)
    known = {whole: moved}
    back = [Node(n.op, tuple([known.get(v, v) for v in n.inputs]), n.attrs, n.outputs, n.where)
            for n in builder.build([x]).nodes]
    inner = [*node.attrs["body"].nodes] if node.op is region else [node]
    members = [Node(n.op, tuple([x if v is out else v for v in n.inputs]), n.attrs, n.outputs, n.where)
               if n.op is ops.attention_grad else n for n in inner]
    return region_of((*back, *members), node.outputs, "attention", node)


def _moving(value: Value, producers: Mapping[Value, Node]) -> list[Node]:
    """The nodes of the kernel that makes `value`, and reshapes behind it."""
    behind: list[Node] = []
    node = producers.get(value)
    while node is not None and node.op.name == "reshape":
        behind.insert(0, node)
        value = node.inputs[0]
        node = producers.get(value)
    if node is None or node.op is not region or node.attrs["template"] != "map" or len(node.outputs) > 1:
        return behind
    return [*node.attrs["body"].nodes, *behind]
