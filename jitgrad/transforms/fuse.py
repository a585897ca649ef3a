"""Graph of primitives -> Graph whose nodes are regions (one kernel each) and primitives that stay alone.

The walk goes from the last node to the first. A node joins the kernel that needs its result, when the loops fit;
readers in several kernels are merged where that is possible, cheap nodes are computed in each of them, and what remains
is stored once and read. Movement ops are index arithmetic: every kernel follows them to what they read.

Templates: see `jitgrad.codegen.lower`. The body of a region consists of the very nodes of the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from jitgrad.ir.axes import Index, is_plain, reduction_index, source_index
from jitgrad.ir.graph import Graph, Node, Value
from jitgrad.ops.region import region
from jitgrad.transforms.epilogue import claim_epilogues, has_complex, is_elementwise
from jitgrad.transforms.foreach import lift_constants
from jitgrad.transforms.groups import Group, Groups, Place
from jitgrad.transforms.product import turn_products
from jitgrad.transforms.prologue import prologue_nodes
from jitgrad.transforms.select import select_in_rows

SINGLE_ROW = 1 << 16
"""A reduction of everything that is spread back over its operand is one kernel up to this number of elements."""


LONGEST_CHAIN = 32
"""Nodes that a kernel computes again, at most, rather than read a value."""


def fuse(graph: Graph, narrow: bool = False, lean: bool = False, packs: bool = True) -> Graph:
    """`graph` with every group of nodes that can be one kernel as one `region` node. `narrow`: the machine has kernels for
    convolutions of 16-bit floats. `lean`: its products leave what they do not need themselves to the kernels that read it.
    `packs`: they copy large factors into panels, and can compute them on the way."""
    for prepare in (lift_constants, select_in_rows, turn_products):
        graph = prepare(graph)
    groups = Fusion(graph, narrow, lean, packs).run()
    return assemble(graph, groups)


class Fusion:
    """One walk over one graph. `stored`: values that must be in memory for reasons outside of regions."""

    def __init__(self, graph: Graph, narrow: bool = False, lean: bool = False, packs: bool = True):
        self.graph, self.lean, self.packs = graph, lean, packs
        self.producers = graph.producers()
        self.groups = Groups(self.producers)
        self.claims = claim_epilogues(graph, narrow)
        self.stored: set[Value] = set(graph.results)
        self.reads = Counter([*graph.results, *[v for node in graph.nodes for v in node.inputs]])
        self.drawn = _made_of_random_bits(graph)

    def run(self) -> Groups:
        for node in reversed(self.graph.nodes):
            self.visit(node)
        for v in self.graph.inputs:
            self.merge_readers(v)
        self.merge_makers()
        return self.groups

    def merge_makers(self) -> None:
        """A result that has to be stored may still be stored by the very kernel that reduces it."""
        makers = {v: group for group in self.groups.living() if group.template == "map"
                  for v in group.made if v in self.groups.readers}
        for v, maker in makers.items():
            for reader in self.groups.readers_of(v):
                if reader.reduced:
                    self.groups.merge(reader, self.groups.find(maker.number))

    def visit(self, node: Node) -> None:
        if not any([v in self.stored or v in self.groups.readers for v in node.outputs]):
            return
        if node.op.kind == "movement":
            self.visit_movement(node)
        elif is_elementwise(node) or (node.op.name in ("iota", "random_bits")):
            self.visit_elementwise(node)
        elif node.op.kind == "reduction" and not has_complex(node):
            self.visit_reduction(node)
        elif node.op.epilogue and node in self.claims.of:
            self.visit_contraction(node)
        else:
            self.stand_alone(node)

    # ---- primitives that stay what they are, and values that have to be stored

    def stand_alone(self, node: Node) -> None:
        """`node` becomes no part of a region; it reads its operands from memory."""
        group = self.groups.new("single")
        self.groups.place(node, group)
        for v in node.inputs:
            self.stored.add(v)
            self.groups.readers.setdefault(v, []).append(group.number)
        for v in node.outputs:
            self.link(group, v)
            self.merge_readers(v)

    def link(self, group: Group, value: Value) -> None:
        """`group` makes `value`; whoever reads it comes behind."""
        for reader in self.groups.readers_of(value):
            self.groups.add_edge(group, reader)

    def merge_readers(self, value: Value) -> list[Group]:
        """Merge the kernels that read `value` as far as possible; those that remain."""
        remaining: list[Group] = []
        for group in self.groups.readers_of(value):
            if not remaining or value.type.size < 2 or not any(self.groups.merge(other, group) for other in remaining):
                remaining.append(group)
        return remaining

    def visit_movement(self, node: Node) -> None:
        """Reached only when the moved value itself has to be in memory."""
        value = node.output
        if value not in self.stored and value not in self.groups.readers:
            return
        if node.op.alias or not has_affine_source(node):
            self.stand_alone(node)
        else:
            self.link(self.seed("map", node), value)

    def seed(self, template: str, node: Node, claim: int | None = None) -> Group:
        """A new group that starts with the result of `node`."""
        group = self.groups.new(template, claim)
        index = self.groups.axes.fresh_index(node.output.shape)
        if node.op.kind == "movement":
            self.groups.demand(group, node.output, index)
            self.groups.place(node, group)
        else:
            group.demands.add(node.output, index)
        return group

    # ---- elementwise

    def visit_elementwise(self, node: Node) -> None:
        value, claim = node.output, self.claims.of.get(node)
        readers = [g for g in self.merge_readers(value)]
        fitting = [g for g in readers if self.may_hold(g, node, claim)]
        alone = value not in self.stored and all(g in fitting or self.may_repeat(g, node) for g in readers)
        free = claim is not None and not fitting and any(map(only_moves, readers))
        repeated = alone and len(readers) > 1 and not free and self.is_worth_repeating(node, readers)
        if repeated or (alone and self.leaves_epilogue(node, readers, fitting)):
            for group in readers:
                self.join(node, group)
            del self.groups.readers[value]          # nobody reads it from memory
            return
        for group in fitting:
            others = [g for g in readers if g is not group]
            if self.fits(node, group, value in self.stored or bool(others)) and self.groups.can_precede(group, others):
                break
        else:
            group = self.seed("map", node, claim)
        self.join(node, group)
        self.link(group, value)

    def may_hold(self, group: Group, node: Node, claim: int | None) -> bool:
        """Epilogues hold what they have claimed, and what does not depend on their contraction."""
        if group.template == "single":
            return False
        if group.claim is None or group.claim == claim:
            return group.claim == claim
        return claim is None and not self.claims.taint[node.output] >> group.claim & 1

    def may_repeat(self, group: Group, node: Node) -> bool:
        """True when `group` may compute for itself what belongs to the epilogue of another contraction."""
        if group.template == "single":
            return False
        return group.claim is None or not self.claims.taint[node.output] >> group.claim & 1

    def fits(self, node: Node, group: Group, is_read_outside: bool) -> bool:
        """True when `group` can compute `node` in its loops."""
        indices = group.demands.of.get(node.output, [])
        if not indices:
            return False                            # a factor of a contraction is read from memory
        if (is_read_outside or node.op.kind == "source") and not all(map(is_plain, indices)):
            return False                            # elements are stored, and counted, in order
        if len(indices) > 1:
            return is_cheap(node) and not is_read_outside
        if is_read_outside and group.template in ("column", "full", "matmul", "convolution"):
            return False                            # it may belong to the kernel that makes its operands
        place = group.place(indices[0])
        if place == group.space or (group.template == "row" and place == group.kept):
            return True
        if is_read_outside:
            return False
        return is_cheap(node) or self.is_hoisted(place, group)

    def is_hoisted(self, place: frozenset[int], group: Group) -> bool:
        """True when a value at `place` is computed outside of the innermost loop."""
        order = group.demands.full_order()
        return group.template in ("map", "row") and (not order or order[-1] not in place)

    def join(self, node: Node, group: Group) -> None:
        self.groups.place(node, group)
        group.taint |= self.claims.taint[node.output]
        for index in list(group.demands.of[node.output]):
            for v in node.inputs:
                self.groups.demand(group, v, index if v.shape else ())

    def is_worth_repeating(self, node: Node, readers: list[Group]) -> bool:
        """True when computing `node` in each of its readers costs no more than to store it and read it: a function of one
        number costs some nanoseconds at most, and memory is better spent on something else."""
        if node.op.kind == "source" and not all(is_plain(i) for g in readers for i in g.demands.of[node.output]):
            return False
        if node.output in self.drawn and node.output.dtype.itemsize == 1:
            return False                            # a mask is smaller than the random words that it is made of
        if node.op.kind == "elementwise" and not node.op.effects and node.output.dtype.itemsize <= 4:
            return self.full_operands(node) <= 1 or len(self.sources(node)) <= 1
        return is_cheap(node) and self.full_operands(node) <= 1

    def sources(self, node: Node) -> set[Value]:
        """The values as large as the result of `node` that a kernel would have to read to compute it by elementwise
        nodes."""
        found: set[Value] = set()
        pending, seen = [node], {node}
        while pending:
            for v in {self.base(v) for v in pending.pop().inputs}:
                maker = self.producers.get(v)
                if v.type.size != node.output.type.size or maker in seen:
                    continue
                if maker is None or v in self.stored or maker.op.kind != "elementwise" or maker.op.effects:
                    found.add(v)
                elif len(seen) == LONGEST_CHAIN:
                    return {v, node.output}
                else:
                    seen.add(maker)
                    pending.append(maker)
        return found

    def leaves_epilogue(self, node: Node, readers: list[Group], fitting: list[Group]) -> bool:
        """True when `node` belongs to the epilogue of a contraction, no part of which reads its result, and its operand
        takes no more memory: then its readers compute it."""
        if not self.lean or fitting or not readers or node not in self.claims.of or node.op.kind != "elementwise":
            return False
        widest = max([v.dtype.itemsize for v in node.inputs])
        return widest <= node.output.dtype.itemsize <= 4 and self.full_operands(node) <= 1

    def full_operands(self, node: Node) -> int:
        """How many different operands are as large as the result once broadcasts are looked through."""
        return len({self.base(v) for v in node.inputs if self.base(v).type.size == node.output.type.size})

    def base(self, value: Value) -> Value:
        node = self.producers.get(value)
        while node is not None and node.op.kind == "movement" and node.op.view:
            value = node.inputs[0]
            node = self.producers.get(value)
        return value

    # ---- reductions

    def visit_reduction(self, node: Node) -> None:
        value = node.output
        readers = self.merge_readers(value)
        for group in readers:
            others = [g for g in readers if g is not group]
            if self.groups.can_precede(group, others) and self.try_reduce(node, group):
                break
        else:
            group = self.seed("map", node)
            joined = self.try_reduce(node, group)
            assert joined, f"{node.op.name} fits no kernel of its own"
        self.link(group, value)

    def try_reduce(self, node: Node, group: Group) -> bool:
        """Make the reduction part of `group`, when its loops and those of the group are one kernel."""
        index = group.demands.only(node.output)
        if index is None or group.claim is not None or not is_plain(index):
            return False
        mark = self.groups.axes.mark()
        source, new = reduction_index(self.groups.axes, node, index)
        template = self.reduced_template(node, group, group.place(index), new, source)
        if template is None or not group.demands.is_consistent():
            self.groups.axes.undo(mark)
            return False
        group.template, group.reduced = template, group.reduced or new
        self.groups.place(node, group)
        group.demands.reads[node] = source
        self.groups.demand(group, node.inputs[0], source)
        return True

    def reduced_template(self, node: Node, group: Group, place: frozenset[int], new: Place,
                         source: Index) -> str | None:
        """The template of `group` with the reduction over the loops `new`, which become those of the group."""
        axes, space = self.groups.axes, group.space
        inner = node.op.spell is None or self.reduces_innermost(node, source, new)
        if group.template == "map" and place == space:
            return ("row" if node.op.spell is None else "full") if not place else "row" if inner else "column"
        if group.template == "map":
            back = tuple([a for a in group.demands.full_order() if a not in place])
            small = bool(place) or axes.size(back) <= SINGLE_ROW
            fits = inner and small and place < space and bool(new) and axes.unify_atoms(back, new)
            return "row" if fits else None
        if not group.reduced or place != group.kept or not axes.unify_atoms(group.reduced, new):
            return None
        if group.template == "row":
            return "row" if inner else None
        return group.template if node.op.spell is not None and self.is_behind_reductions(node, group) else None

    def is_behind_reductions(self, node: Node, group: Group) -> bool:
        """True when `group` uses the result of `node` only where its reductions are done."""
        pending, seen = [node.output], set[Value]()
        while pending:
            value = pending.pop()
            for user in group.nodes:
                if value in user.inputs and user.output not in seen:
                    if user.op.kind == "reduction":
                        return False
                    seen.add(user.output)
                    pending.append(user.output)
        return all(group.place(i) <= group.kept for v in seen for i in group.demands.of[v])

    def reduces_innermost(self, node: Node, source: Index, new: Place) -> bool:
        """True when memory is walked along the reduced loops: looked up where the operand comes from."""
        axes, value, index = self.groups.axes, node.inputs[0], source
        producer = self.producers.get(value)
        while producer is not None and producer.op.kind == "movement":
            traced = source_index(axes, producer, index)
            if traced is None or not axes.flat(traced):
                break
            value, index = producer.inputs[0], traced
            producer = self.producers.get(value)
        flat = axes.flat(index)
        return not flat or not new or flat[-1] in axes.resolve(new)

    # ---- contractions

    def visit_contraction(self, node: Node) -> None:
        value, claim = node.output, self.claims.of[node]
        readers = self.merge_readers(value)
        for group in readers:
            others = [g for g in readers if g is not group]
            if self.is_epilogue(group, value, claim) and self.groups.can_precede(group, others):
                break
        else:
            group = self.seed("map", node, claim)
        self.link(group, value)
        group.template = node.op.epilogue
        self.groups.place(node, group)
        for v in self.take_prologue(group, node):
            self.read_factor(group, v)

    def is_epilogue(self, group: Group, value: Value, claim: int) -> bool:
        """True when `group` computes element by element from the contraction's result `value`."""
        index = group.demands.only(value) if group.claim == claim and group.template == "map" else None
        return index is not None and is_plain(index) and group.place(index) == group.space

    def take_prologue(self, group: Group, node: Node) -> list[Value]:
        """What the contraction's kernels read; what they compute of it on the way is part of the group."""
        matmul = group.template == "matmul"
        taken = prologue_nodes(node, self.producers, self.reads, self.packs) if matmul else []
        if any(inner in self.claims.of for inner in taken):
            return list(node.inputs)
        group.nodes.update(dict.fromkeys(taken))
        made = {v for inner in taken for v in inner.outputs}
        return [v for v in dict.fromkeys([*node.inputs, *[v for inner in taken for v in inner.inputs]]) if v not in made]

    def read_factor(self, group: Group, value: Value) -> None:
        """An operand of a contraction. Those of a matmul are permuted and broadcast by the kernel itself."""
        node = self.producers.get(value) if group.template == "matmul" else None
        while node is not None and node.op.name in ("permute", "broadcast_to"):
            group.nodes[node] = None
            value = node.inputs[0]
            node = self.producers.get(value)
        self.stored.add(value)
        self.groups.readers.setdefault(value, []).append(group.number)


def only_moves(group: Group) -> bool:
    """True for a kernel that does nothing but read in another order. What follows a contraction is not worth repeating in
    there: the contraction stores it at no cost, and attention need not have the moved copy at all."""
    return all(node.op.kind == "movement" for node in group.nodes)


def has_affine_source(node: Node) -> bool:
    return node.op.view


def _made_of_random_bits(graph: Graph) -> set[Value]:
    """Values that are computed element by element from random words."""
    found: set[Value] = set()
    for node in graph.nodes:
        if node.op.name == "random_bits" or (node.op.kind == "elementwise" and not found.isdisjoint(node.inputs)):
            found.update(node.outputs)
    return found


def is_cheap(node: Node) -> bool:
    """Plain operators cost less than reading their result from memory."""
    return not node.op.effects and ("{" in (node.op.spell or "") or node.op.kind == "source")


# ---- the new graph -------------------------------------------------------------------------------------------------


def assemble(graph: Graph, groups: Groups) -> Graph:
    """The graph of regions, every one behind what it reads, in the order of their last nodes in the program; but what
    makes nothing but outputs comes as soon as it can, for then what it reads may go."""
    position = {node: k for k, node in enumerate(graph.nodes)}
    results = set(graph.results)
    ordered = _in_order(groups, position)
    only_outputs = set(graph.outputs) - {v for _, v in graph.writes}
    time: dict[int, int] = {}
    for k, group in enumerate(ordered):
        early = all([v in only_outputs for v in group.made if _is_read_outside(v, group, groups, results)])
        before = [time[g.number] for g in map(groups.find, group.before) if g is not group]
        time[group.number] = max(before, default=0) if early and not any(n.op.effects for n in group.nodes) else k
    ordered.sort(key=lambda g: time[g.number])            # keeps the order of equals, which is a possible one
    return graph.replace(nodes=tuple([_region_node(group, groups, position, results) for group in ordered]))


def _in_order(groups: Groups, position: dict[Node, int]) -> list[Group]:
    """All groups, each behind those that it reads from."""
    ordered: list[Group] = []
    done, begun = set[int](), set[int]()
    for group in sorted(groups.living(), key=lambda g: max(position[node] for node in g.nodes)):
        stack = [group]
        while stack:
            top = stack[-1]
            waiting = [g for g in map(groups.find, top.before) if g is not top and g.number not in done]
            if top.number in done:
                stack.pop()
            elif waiting:
                assert top.number not in begun, "groups of nodes wait for each other"
                begun.add(top.number)
                stack.extend(waiting)
            else:
                done.add(stack.pop().number)
                ordered.append(top)
    return ordered


def _region_node(group: Group, groups: Groups, position: dict[Node, int], results: set[Value]) -> Node:
    members = sorted(group.nodes, key=position.__getitem__)
    if group.template == "single" or (group.template == "convolution" and len(members) == 1):
        return members[0]
    inside = {v for node in members for v in node.outputs}
    inputs = dict.fromkeys([v for node in members for v in node.inputs if v not in inside])
    outputs = [v for node in members for v in node.outputs
               if v in group.made and _is_read_outside(v, group, groups, results)]
    body = Graph(tuple(inputs), tuple(members), tuple(outputs), group.template)
    return Node(region, body.inputs, {"body": body, "template": group.template}, body.outputs, members[-1].where)


def _is_read_outside(value: Value, group: Group, groups: Groups, results: Iterable[Value]) -> bool:
    return value in results or any(reader is not group for reader in groups.readers_of(value))
