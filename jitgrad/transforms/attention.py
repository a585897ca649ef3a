"""Attention that is written out becomes the primitive that never holds its scores.

In: a graph with ``softmax(scores) @ v``, where scores are a product ``q @ k`` and then, in any order, multiplied or
divided by numbers, added to masks, or replaced by -inf where a mask says so, and perhaps reshaped so that batch and heads
are one dimension or two; dropout may follow the softmax. Out: the
graph with `attention` in its place, and with `attention_grad` in place of every backward pass through it that the graph
holds. Results change by rounding, as where sums are taken in another order; where an added mask is -inf, a score that is
nan or infinite is hidden like any other.

How a backward pass is known: the gradient rules are carried out once more on the nodes that were found, by an
interpreter that makes nothing but looks up the node that computes the same already (`_Finder`). Whatever it finds is
that gradient, however the user came to write it. So a rewrite is always right; and it is made only where it leaves no
reader of the scores, of the weights, or of their gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.dtypes import float32, float64
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value, attrs_key, next_id, run_node
from jitgrad.ir.op import Op
from jitgrad.ops.attention import mask_by_head
from jitgrad.ops.builders import broadcast, full
from jitgrad.ops.gradient import reverse
from jitgrad.transforms.autodiff import vjp
from jitgrad.transforms.cse import eliminate_common_subexpressions
from jitgrad.transforms.dce import eliminate_dead_code
from jitgrad.transforms.halfplane import Affine, Split, classify

MOST_STEPS = 16                                         # between the product and the softmax
Step = tuple[str, Value]                                # what happens to the scores, and the operand that it reads


def recognize_attention(graph: Graph) -> Graph:
    """See the module. A graph without such attention comes back as it is."""
    if not _may_hold_attention(graph):
        return graph
    clean = eliminate_common_subexpressions(eliminate_dead_code(graph))
    view = _View(clean)
    taken: set[Node] = set()
    found = []
    for node in clean.nodes:
        written = _Reading(view, node).attention() if node.op.name == "matmul" else None
        if written is None or not taken.isdisjoint(written.nodes):
            continue
        if any(_leaves_nothing(view, written) for _ in _with_passes(view, written)):
            taken.update(written.nodes)
            found.append(written)
    return eliminate_dead_code(_replaced(clean, found)) if found else graph


def _may_hold_attention(graph: Graph) -> bool:
    """A look at the first operands of products: one of them would be a softmax, or dropout."""
    producers = graph.producers()
    makers = [producers.get(node.inputs[0]) for node in graph.nodes if node.op.name == "matmul"]
    return any([node is not None and (node.op.name == "where" or _is_softmax(node, producers)) for node in makers])


def _is_softmax(node: Node, producers: Mapping[Value, Node]) -> bool:
    """Whether `node` looks like the last step of one."""
    raised = producers.get(node.inputs[0]) if node.op.name in ("div", "mul") else None
    return raised is not None and raised.op.name == "exp"


class _View:
    """A graph without repetitions, and who makes, reads and repeats its values."""

    def __init__(self, graph: Graph):
        self.producers = graph.producers()
        self.uses = graph.uses()
        self.results = set(graph.results)
        self.position = {node: k for k, node in enumerate(graph.nodes)}
        self.nodes = {_key(node.op, node.inputs, node.attrs): node for node in graph.nodes if not node.op.effects}

    def made(self, v: Value, name: str) -> Node | None:
        node = self.producers.get(v)
        return node if node is not None and node.op.name == name else None

    def narrow(self, v: Value) -> Value:
        """`v` before it was broadcast."""
        node = self.made(v, "broadcast_to")
        return self.narrow(node.inputs[0]) if node else v

    def scalar(self, v: Value) -> Value | None:
        """The 0-d value that all elements of `v` are."""
        while v.type.ndim:
            node = self.producers.get(v)
            if node is None or node.op.name not in ("reshape", "broadcast_to", "cast") \
                    or node.output.dtype is not node.inputs[0].dtype:
                return None
            v = node.inputs[0]
        return v

    def is_constant(self, v: Value, value: float) -> bool:
        single = self.scalar(v)
        node = self.made(single, "constant") if single is not None else None
        return node is not None and bool(np.asarray(node.attrs["value"] == value))


def _key(op: Op, inputs: tuple[Value, ...], attrs: Mapping[str, Any]) -> tuple[Any, ...]:
    return op.name, tuple(sorted(inputs, key=id)) if op.commutative else inputs, attrs_key(attrs)


# ---- the forward pass ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Written:
    """Attention as it stands in a graph: scores = `query` @ `key`, then `steps`, softmax, dropout by `draw`, @ `value`."""

    query: Value
    key: Value
    value: Value
    steps: list[Step]
    draw: tuple[Value, ...]
    weights: Value                                      # what `value` is multiplied with
    nodes: list[Node]                                   # all of it in order, from the first product to the last
    shift: set[Node]                                    # those of them that make the maximum
    batch: tuple[int, ...]                              # the dimensions in front where masks are applied
    passes: list[_Pass] = field(default_factory=list)

    @property
    def scores(self) -> Node:
        return self.nodes[0]

    @property
    def last(self) -> Node:
        return self.nodes[-1]


@dataclass(frozen=True, eq=False)
class _Pass:
    """A backward pass: the gradient that comes in, those that leave (of query, key, value; None: not wanted), its nodes."""

    incoming: Value
    leaving: tuple[Value | None, ...]
    nodes: list[Node]


class _Reading:
    """Reads attention backwards from its last product, and remembers the nodes that it went through."""

    def __init__(self, view: _View, last: Node):
        self.view = view
        self.last = last
        self.nodes = {last}
        self.shift: set[Node] = set()
        self.others: set[Value] = set()                 # that are no scores
        self.batches: set[tuple[int, ...]] = set()      # the dimensions in front of scores that masks meet

    def attention(self) -> _Written | None:
        weights, value = self.last.inputs
        if weights.dtype not in (float32, float64) or not (weights.type.size and value.type.size):
            return None
        draw, normal = self._dropout(weights)
        scores = self._softmax(normal)
        steps: list[Step] = []
        product = self._product(scores, steps) if scores is not None else None
        if product is None or not product.inputs[0].type.size:
            return None
        ordered = sorted(self.nodes, key=self.view.position.__getitem__)
        if ordered[0] is not product or ordered[-1] is not self.last:
            return None
        if len(self.batches) > 1:
            return None
        query, key = product.inputs
        batch = next(iter(self.batches), product.output.shape[:-2])
        return _Written(query, key, value, steps, draw, weights, ordered, self.shift, batch)

    def _take(self, v: Value, name: str) -> Node | None:
        """The node of that name that made `v`; it belongs to the attention."""
        node = self.view.made(v, name)
        if node is not None:
            self.nodes.add(node)
        return node

    def _dropout(self, weights: Value) -> tuple[tuple[Value, ...], Value]:
        """The operands of dropout, and the weights before it; nothing and `weights` where there is none."""
        chosen = self.view.made(weights, "where")
        scaled = self.view.made(chosen.inputs[1], "mul") if chosen else None
        draw = self._draw(chosen.inputs[0]) if chosen else None
        if chosen is None or scaled is None or draw is None or not self.view.is_constant(chosen.inputs[2], 0.0):
            return (), weights
        for before, scale in (scaled.inputs, scaled.inputs[::-1]):
            single = self.view.scalar(scale)
            if single is not None:
                self.nodes |= {chosen, scaled}
                return (*draw, single), before
        return (), weights

    def _draw(self, kept: Value) -> tuple[Value, ...] | None:
        """Key, offset and probability when `kept` is what dropout keeps of the scores, a random word for each."""
        least = self.view.made(kept, "ge")
        unit = self.view.made(least.inputs[0], "mul") if least else None
        if least is None or unit is None or not self.view.is_constant(unit.inputs[1], 2.0 ** -24):
            return None
        p = self.view.scalar(least.inputs[1])
        wide = self.view.made(unit.inputs[0], "cast")
        shifted = self.view.made(wide.inputs[0], "shift_right") if wide else None
        bits = self.view.made(shifted.inputs[0], "random_bits") if shifted else None
        if shifted is None or bits is None or p is None or p.dtype is not float32:
            return None
        return (*bits.inputs, p) if self.view.is_constant(shifted.inputs[1], 8) else None

    def _softmax(self, weights: Value) -> Value | None:
        """What `weights` are the softmax of, along the last dimension: exp divided by its sum, or times the reciprocal."""
        quotient = self._take(weights, "div")
        last = quotient or self._take(weights, "mul")
        raised = self._take(last.inputs[0], "exp") if last else None
        if last is None or raised is None or self._reduced(last.inputs[1], "sum", quotient is None) is not raised.output:
            return None
        shifted = self._take(raised.inputs[0], "sub")
        if shifted is None:
            return None
        before = set(self.nodes)
        largest = self._reduced(shifted.inputs[1], "max")
        self.shift = self.nodes - before
        return largest if largest is shifted.inputs[0] else None

    def _reduced(self, v: Value, name: str, inverse: bool = False) -> Value | None:
        """x when `v` is the reduction of x along its last dimension, or its reciprocal, at x's shape again."""
        shape = v.shape
        wide = self._take(v, "broadcast_to")
        narrow = wide.inputs[0] if wide else v
        turned = self._take(narrow, "reciprocal") if inverse else None
        if inverse and turned is None:
            return None
        column = self._take(turned.inputs[0] if turned else narrow, "reshape")
        node = self._take(column.inputs[0], name) if column else None
        if node is None or column is None or column.output.shape != (*shape[:-1], 1):
            return None
        x = node.inputs[0]
        return x if node.attrs["axes"] == (len(shape) - 1,) and x.shape == shape else None

    def _product(self, scores: Value, steps: list[Step], most: int = MOST_STEPS) -> Node | None:
        """The product that `scores` are made from, and in `steps` how, first step first."""
        node = self.view.producers.get(scores)
        if node is None or node.op.name not in ("matmul", "reshape", "mul", "div", "add", "sub", "where") \
                or scores in self.others:
            return None
        if node.op.name == "matmul":
            self.nodes.add(node)
            return node
        if node.op.name == "reshape":
            before = node.inputs[0]
            product = self._product(before, steps, most) if before.shape[-2:] == scores.shape[-2:] else None
            self.nodes |= {node} if product is not None else set()
            return product
        for before, step in self._steps(node) if most else ():
            product = self._product(before, steps, most - 1)
            if product is not None:
                self.nodes.add(node)
                steps.append(step)
                if step[0] not in ("mul", "div"):
                    self.batches.add(scores.shape[:-2])
                return product
        self.others.add(scores)
        return None

    def _steps(self, node: Node) -> Iterator[tuple[Value, Step]]:
        """What `node` may be as a step: the scores before it, and what it does to them."""
        if node.op.name == "where":
            condition, x, y = node.inputs
            for before, fill, name in ((y, x, "hide where"), (x, y, "hide where not")):
                if self.view.is_constant(fill, -math.inf):
                    yield before, (name, self.view.narrow(condition))
        elif node.op.name == "add":
            for before, mask in (node.inputs, node.inputs[::-1]):
                yield before, ("add", self.view.narrow(mask))
        elif node.op.name == "sub":
            yield node.inputs[0], ("sub", self.view.narrow(node.inputs[1]))
        else:
            pairs = (node.inputs, node.inputs[::-1]) if node.op.name == "mul" else (node.inputs,)
            for before, number in pairs:
                single = self.view.scalar(number)
                if single is not None:
                    yield before, (node.op.name, single)


# ---- the backward pass -----------------------------------------------------------------------------------------------


class _Finder(GraphBuilder):
    """Carries out ops by finding nodes of a graph that do. What none does becomes a value that nobody makes."""

    def __init__(self, view: _View, stand_for: Mapping[Value, Value]):
        super().__init__()
        self.view = view
        self.stand_for = stand_for
        self.found: list[Node] = []

    def run(self, op: Op, inputs: tuple[Value, ...], attrs: dict[str, Any]) -> Any:
        real = tuple([self.stand_for.get(v, v) for v in inputs])
        node = self.view.nodes.get(_key(op, real, attrs))
        if node is None:
            return super().run(op, real, attrs)
        self.found.append(node)
        return node.outputs[0] if op.outputs == 1 else node.outputs


def _with_passes(view: _View, written: _Written) -> Iterator[None]:
    """Fills in every backward pass through it that the graph holds, wholly or in parts: first as if the maximum in the
    softmax had been detached, then with its gradient, which is zero but for rounding."""
    finder = _Finder(view, {})
    with finder:
        turned = [ops.transposed(v) for v in (written.weights, written.value)]
    candidates = [node.inputs[1 - side] for side, v in enumerate(turned) for node in view.uses.get(v, ())
                  if node.op.name == "matmul" and node.inputs[side] is v]
    fitting = [g for g in dict.fromkeys(candidates) if g.type == written.last.output.type]
    for constant in (written.shift, set[Node]()):
        passes = [_backward_pass(view, written, g, constant) for g in fitting]
        written.passes = [p for p in passes if any(v is not None for v in p.leaving)]
        yield


def _backward_pass(view: _View, written: _Written, incoming: Value, constant: set[Node]) -> _Pass:
    """The gradients of query, key and value, which may be one and the same, each for itself."""
    wanted = [Value(-1, v.type) for v in (written.query, written.key, written.value)]
    first, last = written.scores, written.last
    nodes = [node for node in written.nodes if node not in constant]
    nodes[0] = Node(first.op, tuple(wanted[:2]), first.attrs, first.outputs)
    nodes[-1] = Node(last.op, (written.weights, wanted[2]), last.attrs, last.outputs)
    finder = _Finder(view, dict(zip(wanted, (written.query, written.key, written.value), strict=True)))
    with finder:
        gradients = reverse(nodes, {last.output: incoming}, wanted)
    after = view.position[last]
    leaving = [gradients.get(v) for v in wanted]
    there = [v if v in view.producers and view.position[view.producers[v]] > after else None for v in leaving]
    return _Pass(incoming, tuple(there), finder.found)


def _leaves_nothing(view: _View, written: _Written) -> bool:
    """Whether nobody needs the scores, or what was made of them on the way to results, once those are replaced."""
    exits = {written.last.output, *[v for p in written.passes for v in p.leaving if v is not None]}
    inside = {*written.nodes, *[node for p in written.passes for node in p.nodes]}
    made = set(written.scores.outputs)
    for node in sorted(inside, key=view.position.__getitem__):
        arriving = any(v in made or any(v is p.incoming for p in written.passes) for v in node.inputs)
        if arriving or node is written.scores:
            made.update(v for v in node.outputs if v not in exits)
    return all(v not in view.results and inside.issuperset(view.uses[v]) for v in made)


# ---- in its place ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Replacement:
    """The primitive for some attention: a graph of `operands`, with its backward pass behind the first `forward` nodes."""

    joint: Graph
    operands: tuple[Value, ...]
    forward: int
    gradients: tuple[int | None, ...]


def _replaced(graph: Graph, found: Iterable[_Written]) -> Graph:
    """`graph` with everything in `found` replaced; what nobody reads any more is still there."""
    producers = graph.producers()
    forward = {written.last: (_replacement(written, producers), written) for written in found}
    backward = {v: (made, written, p) for made, written in forward.values() for p in written.passes for v in p.leaving
                if v is not None}
    builder = GraphBuilder(graph.name)
    builder.inputs, builder.count = list(graph.inputs), next_id(graph)
    mapped: dict[Value, Value] = {v: v for v in graph.inputs}
    inner: dict[_Written, dict[Value, Value]] = {}
    with builder:
        for node in graph.nodes:
            builder.where = node.where
            if node in forward:
                made, written = forward[node]
                environment = inner[written] = {x: mapped[v] for x, v in zip(made.joint.inputs, made.operands)}
                for n in made.joint.nodes[:made.forward]:
                    run_node(n, environment)
                mapped[node.output] = environment[made.joint.outputs[0]]
            elif len(node.outputs) == 1 and node.output in backward:
                if node.output not in mapped:
                    made, written, p = backward[node.output]
                    mapped.update(_gradients(made, inner[written], p, mapped))
            else:
                kept = builder.keep(node, tuple([mapped[v] for v in node.inputs]))
                mapped.update(zip(node.outputs, kept, strict=True))
    return builder.build([mapped[v] for v in graph.outputs], [(i, mapped[v]) for i, v in graph.writes])


def _gradients(made: _Replacement, forward: Mapping[Value, Value], p: _Pass,
               mapped: Mapping[Value, Value]) -> dict[Value, Value]:
    """Appends a backward pass; what now stands for the values that leave it."""
    environment = {**forward, made.joint.inputs[-1]: mapped[p.incoming]}
    for node in made.joint.nodes[made.forward:]:
        run_node(node, environment)
    return {v: environment[made.joint.outputs[k]] for v, k in zip(p.leaving, made.gradients, strict=True)
            if v is not None and k is not None}


def _replacement(written: _Written, producers: Mapping[Value, Node]) -> _Replacement:
    operands = tuple(dict.fromkeys([written.query, written.key, written.value, *[v for _, v in written.steps],
                                    *written.draw]))
    three = (written.query, written.key, written.value)
    builder = GraphBuilder("attention")
    q, k, v = [builder.input(x.type) for x in three]
    others = {x: builder.input(x.type) for x in operands if x not in three or x in [s for _, s in written.steps]}
    with builder:
        out = _blockwise(written, producers, q, k, v, others)
    graph = builder.build([out])
    joint = vjp(graph, (0, 1, 2), (0,))
    return _Replacement(joint.graph, (*three, *others), len(graph.nodes), joint.gradients)


def _blockwise(written: _Written, producers: Mapping[Value, Node], q: Value, k: Value, v: Value,
               others: Mapping[Value, Value]) -> Value:
    """The primitive, its operands flattened to one dimension of heads; numbers multiply the query."""
    queries, keys = written.scores.output.shape[-2:]
    heads = math.prod(written.batch)
    mask: Any = None
    causal = False
    steps = list(written.steps)
    for number, (name, value) in enumerate(steps):
        if name in ("mul", "div"):
            op = ops.mul if name == "mul" else ops.div
            q = op(q, broadcast(others[value], q.shape))
            mask = mask if mask is None else op(mask, broadcast(others[value], mask.shape))
        elif not any(later in ("mul", "div") for later, _ in steps[number:]) and _is_causal(name, value, producers):
            causal = True
        else:
            mask = _with_mask(mask, name, others[value], q)
    operands = [ops.reshape(x, shape=(heads, *x.shape[-2:])) for x in (q, ops.transposed(k), v)]
    if mask is not None:
        operands.append(mask_by_head(mask, written.batch, keys))
    operands += [others[x] for x in written.draw]
    out, _ = ops.attention(*operands, causal=causal, zero=False)
    return ops.reshape(out, shape=(*v.shape[:-2], queries, v.shape[-1]))  # type: ignore[no-any-return]


def _with_mask(mask: Any, name: str, operand: Value, like: Value) -> Any:
    """What is added to the scores, after one more step, at the common shape of both."""
    shape = operand.shape if mask is None else tuple([
        n if m == 1 else m for n, m in itertools.zip_longest(operand.shape, mask.shape)])
    operand = broadcast(operand, shape)
    mask = mask if mask is None else broadcast(mask, shape)
    if name == "add":
        return operand if mask is None else ops.add(mask, operand)
    if name == "sub":
        return ops.neg(operand) if mask is None else ops.sub(mask, operand)
    hidden, seen = full(shape, -math.inf, like.dtype), full(shape, 0.0, like.dtype) if mask is None else mask
    return ops.where(operand, hidden, seen) if name == "hide where" else ops.where(operand, seen, hidden)


def _is_causal(name: str, operand: Value, producers: Mapping[Value, Node]) -> bool:
    """Whether the step hides what lies above the diagonal, and changes nothing else."""
    found = classify(operand, producers)
    if type(found) is not Split:
        return False
    low, high = {"add": (0.0, -math.inf), "sub": (0.0, math.inf), "hide where": (False, True),
                 "hide where not": (True, False)}[name]
    rank = operand.type.ndim
    above = {(rank - 2, -1), (rank - 1, 1)}
    plane = found.plane
    if (found.low, found.high) == (high, low):          # the other side: not f >= 0 is -f - 1 >= 0
        plane = Affine(tuple([(axis, -factor) for axis, factor in plane.factors]), -plane.constant - 1)
    elif (found.low, found.high) != (low, high):
        return False
    return set(plane.factors) == above and plane.constant == -1
