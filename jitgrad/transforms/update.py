"""Graph of regions -> the same, with optimizer updates behind the products that make their gradients.

A `foreach` that updates parameters reads gradients. Where a gradient is the result of a matmul's region, and nothing
but this update reads it, the formula becomes part of that region: the block of the gradient is still in the cache when
the parameter and the optimizer's state are updated in place. The gradient is stored as before, for `p.grad`.

The region has to come behind whatever else reads the parameter (the gradient of the layer's input), behind the last
node that may fail (parameters stay unchanged then), and behind what else the formula reads: step counts and step sizes,
which depend on no gradient, are moved up for this. A product that would have to wait for long keeps what it reads in
memory for long, and stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from jitgrad import dtypes, ops
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value, next_id
from jitgrad.ops.contraction import PRODUCTS
from jitgrad.ops.region import region
from jitgrad.transforms.memory import has_effects, last_failure

LEAST_ROWS, LEAST_SIZE, LEAST_DEPTH = 512, 1 << 16, 256
"""Rows and elements of a parameter, and terms of the sums in its gradient, below which its update stays with those of
the others: measured, a product of few rows or short sums loses more by whole rows as items than its update gains."""

LONGEST_WAIT = 6
"""Nodes that a product may be moved behind."""


@dataclass(frozen=True, slots=True)
class Update:
    """Group number `group` of the foreach node `node`, whose operand number `gradient` is the result of `product`."""

    node: Node
    group: int
    gradient: int
    product: Node

    @property
    def operands(self) -> tuple[Value, ...]:
        """What the formula reads: shared operands, then those of the group."""
        shared = self.node.attrs["shared"]
        return (*self.node.inputs[:shared], *self.node.inputs[shared + self.group::self.node.attrs["groups"]])

    @property
    def others(self) -> tuple[Value, ...]:
        """`operands` without the gradient."""
        return tuple([v for k, v in enumerate(self.operands) if k != self.gradient])

    @property
    def outputs(self) -> tuple[int, ...]:
        """Which outputs of the foreach node the group has."""
        return tuple(range(self.group, len(self.node.outputs), self.node.attrs["groups"]))


def fuse_updates(graph: Graph) -> Graph:
    """See the module's text."""
    updates = _find_updates(graph)
    if not updates:
        return graph
    order = _Order(graph, updates)
    updates = order.updates
    return _rewrite(graph.replace(nodes=order.nodes()), updates) if updates else graph


# ---- which updates ------------------------------------------------------------------------------------------------


def _find_updates(graph: Graph) -> list[Update]:
    producers, reads = graph.producers(), Counter([v for node in graph.nodes for v in node.inputs])
    found: dict[Node, Update] = {}                          # by product: one update each
    for node in graph.nodes:
        for group in range(node.attrs["groups"] if node.op.kind == "foreach" else 0):
            update = _find_update(node, group, producers, reads)
            if update is not None:
                found.setdefault(update.product, update)
    return list(found.values())


def _find_update(node: Node, group: int, producers: dict[Value, Node], reads: Counter[Value]) -> Update | None:
    """The update of a group, if it can be part of the product that makes its gradient."""
    body, shared = node.attrs["body"], node.attrs["shared"]
    operands = Update(node, group, 0, node).operands
    made = [v for inner in body.nodes for v in inner.outputs]
    plain = set(body.outputs) <= set(made) and len(set(body.outputs)) == len(body.outputs)
    if not plain or not _is_large(operands[shared]) or not all(_is_kept_exactly(v) for v in (*body.inputs, *made)):
        return None
    products = {k: producers[v] for k, v in enumerate(operands) if v in producers and _is_product(producers[v])}
    for k, product in products.items():
        alone = sum([reads[v] for v in product.outputs]) == 1
        apart = not any([v.shape and v in product.inputs for v in operands])
        if alone and apart and operands[k].shape == operands[shared].shape and k > shared:
            return Update(node, group, k, product)
    return None


def _is_large(parameter: Value) -> bool:
    shape = parameter.shape
    return len(shape) == 2 and shape[0] >= LEAST_ROWS and parameter.type.size >= LEAST_SIZE


def _is_kept_exactly(value: Value) -> bool:
    """False for types that are wider inside of a kernel than in memory, and for those that no kernel computes."""
    return value.dtype not in (dtypes.float16, dtypes.bfloat16) and not value.dtype.is_complex


def _is_product(node: Node) -> bool:
    if node.op is not region or node.attrs["template"] != "matmul":
        return False
    body: Graph = node.attrs["body"]
    (product,) = [inner for inner in body.nodes if inner.op in PRODUCTS]
    terms: int = product.inputs[0].shape[-1]
    return terms >= LEAST_DEPTH and not any([inner.op.kind == "reduction" for inner in body.nodes])


# ---- when ---------------------------------------------------------------------------------------------------------


class _Order:
    """Times at which nodes run: positions in the program, but later ones for products that update, and earlier ones for
    0-d nodes that formulas read and no gradient does. `updates`: those whose products need not wait for long."""

    def __init__(self, graph: Graph, updates: Iterable[Update]):
        self.graph = graph
        self.producers = graph.producers()
        self.readers = graph.uses()
        self.position = {node: k for k, node in enumerate(graph.nodes)}
        self.failure = last_failure(graph.nodes)
        self.early = _scalars_of_inputs(graph)
        self.earlier: dict[Node, int] = {}
        self.later: dict[Node, int] = {}
        self.updates = [update for update in updates if self.place(update)]

    def place(self, update: Update) -> bool:
        """Find the time of the update's product; False when it would have to wait for long."""
        begin = self.position[update.product]
        readers = [node for v in update.others if v.shape for node in self.readers[v] if node is not update.node]
        time = max(begin, self.failure, *[self.position[node] for node in readers],
                   *[self.ready(self.producers[v]) for v in update.others if v in self.producers])
        if time - begin > LONGEST_WAIT or time >= self.position[update.node]:
            return False
        self.later[update.product] = time
        for v in update.others:
            self.move_up(v)
        return True

    def ready(self, node: Node) -> int:
        """The time from which the results of `node` can be there."""
        return self.failure if node in self.early else self.position[node]

    def move_up(self, value: Value) -> None:
        """Let 0-d nodes that `value` needs run as early as they can."""
        stack = [value]
        while stack:
            node = self.producers.get(stack.pop())
            if node is not None and node in self.early and node not in self.earlier:
                self.earlier[node] = min(self.failure, self.position[node])
                stack.extend(node.inputs)

    def nodes(self) -> tuple[Node, ...]:
        """All nodes by their times; of those at one time, first what always ran then, and updates last."""
        def key(node: Node) -> tuple[int, int]:
            if node in self.later:
                return self.later[node], 2
            return (self.earlier[node], 1) if node in self.earlier else (self.position[node], 0)

        return tuple(sorted(self.graph.nodes, key=key))


def _scalars_of_inputs(graph: Graph) -> set[Node]:
    """Nodes without effects whose results are 0-d and depend on nothing but inputs of the graph and constants."""
    inputs, found, made = set(graph.inputs), set[Node](), set[Value]()
    for node in graph.nodes:
        if not has_effects(node) and not any(v.shape for v in node.outputs) and all(
                [v in made or v in inputs for v in node.inputs]):
            found.add(node)
            made.update(node.outputs)
    return found


# ---- the new graph ------------------------------------------------------------------------------------------------


def _rewrite(graph: Graph, updates: Iterable[Update]) -> Graph:
    """`graph` with every update in the region of its product, and not in its foreach any more."""
    behind = {update.product: update for update in updates}
    taken: dict[Node, list[int]] = {}
    for update in behind.values():
        taken.setdefault(update.node, []).append(update.group)
    results = set(graph.results)
    nodes: list[Node] = []
    for node in graph.nodes:
        if node in behind:
            nodes.append(_with_update(behind[node], results))
        elif node in taken:
            nodes.extend(_without(node, set(taken[node])))
        else:
            nodes.append(node)
    return graph.replace(nodes=tuple(nodes))


def _without(node: Node, groups: set[int]) -> list[Node]:
    """A foreach node without these groups, unless that is all of it."""
    count, shared = node.attrs["groups"], node.attrs["shared"]
    inputs = [v for k, v in enumerate(node.inputs[shared:]) if k % count not in groups]
    outputs = [v for k, v in enumerate(node.outputs) if k % count not in groups]
    attrs = {**node.attrs, "groups": count - len(groups)}
    rest = Node(node.op, (*node.inputs[:shared], *inputs), attrs, tuple(outputs), node.where)
    return [rest] if outputs else []


def _with_update(update: Update, results: set[Value]) -> Node:
    """The region of the product and of the update. It stores the gradient only where that is a result."""
    product, inner = update.product, update.product.attrs["body"]
    operands = tuple(dict.fromkeys((*product.inputs, *update.others)))
    builder = GraphBuilder(inner.name)
    builder.count = next_id(inner)
    known = {v: builder.input(v.type) for v in operands}
    within = {v: known[outer] for v, outer in zip(inner.inputs, product.inputs, strict=True)}
    with builder:
        for node in inner.nodes:
            builder.where = node.where
            within.update(zip(node.outputs, builder.keep(node, tuple([within[v] for v in node.inputs])), strict=True))
        known |= {outer: within[v] for v, outer in zip(inner.outputs, product.outputs, strict=True)}
        builder.where = update.node.where
        updated = _carry_out(update.node.attrs["body"], [known[v] for v in update.operands],
                             update.operands[update.gradient].shape)
    kept = [v for v in product.outputs if v in results]
    body = builder.build([*[known[v] for v in kept], *updated])
    made = (*kept, *[update.node.outputs[k] for k in update.outputs])
    return Node(region, operands, {"body": body, "template": "update"}, made, product.where)


def _carry_out(formula: Graph, operands: list[Value], shape: tuple[int, ...]) -> list[Value]:
    """The results of `formula`, a graph over 0-d values, on arrays of `shape`; what depends on 0-d operands alone stays
    0-d until it meets an element."""
    environment = dict(zip(formula.inputs, operands, strict=True))
    spread: dict[Value, Value] = {}

    def whole(value: Value) -> Value:
        if value.shape == shape:
            return value
        if value not in spread:
            spread[value] = ops.broadcast_to(ops.reshape(value, shape=(1,) * len(shape)), shape=shape)
        return spread[value]

    for node in formula.nodes:
        inputs = [environment[v] for v in node.inputs]
        if any([v.shape for v in inputs]):
            inputs = [whole(v) for v in inputs]
        environment[node.output] = node.op(*inputs, **node.attrs)
    return [whole(environment[v]) for v in formula.outputs]
