"""Applying gradient rules: the one engine behind the Graph transform and the eager tape.

    reads(op, wanted)                        which inputs and outputs the rules of the wanted operands read
    apply_rule(op, …, which)                 one rule, its parameters looked up by where they come from
    operand_gradients(op, …, wanted)         the gradients of all wanted operands of one application of an op
    reverse(nodes, seeds, wrt)               the whole backward pass over a straight list of nodes
    continue_graph(graph)                    a builder to append such a pass to a graph with

Rules call ops, so all of this runs under whatever interpreter is current. Operands and gradients are values of that
interpreter (arrays, Tensors, graph Values); a gradient that is not there is None, and counts as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from jitgrad import ops
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value, next_id
from jitgrad.ir.op import Op, Rule
from jitgrad.ir.types import TensorType

__all__ = ["apply_rule", "continue_graph", "depends_on", "operand_gradients", "reads", "reverse"]


Read = Callable[[Node, Sequence[Any]], tuple[Sequence[Any], Sequence[Any]]]


def reads(op: Op, wanted: Sequence[bool]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Positions of the inputs and of the outputs that the rules of the `wanted` operands read: what a tape keeps."""
    rules = _rules_of(op, wanted)
    inputs = {k for rule in rules for k in rule.reads_inputs}
    outputs = {k for rule in rules for k in rule.reads_outputs}
    kinds = {kind for rule in rules for kind, _ in rule.sources}
    if "inputs" in kinds:
        inputs = set(range(len(wanted)))
    if "outputs" in kinds:
        outputs = set(range(op.outputs))
    return tuple(sorted(inputs)), tuple(sorted(outputs))


def _rules_of(op: Op, wanted: Sequence[bool]) -> list[Rule]:
    if op.variadic:
        return [rule for rule in op.rules if rule is not None and any(wanted)]
    return [rule for rule, want in zip(op.rules, wanted, strict=False) if rule is not None and want]


def apply_rule(op: Op, attrs: Mapping[str, Any], types: Sequence[TensorType], inputs: Any, outputs: Any,
               gradients: Sequence[Any], which: int) -> Any:
    """The gradient of operand `which` (of a variadic op: a tuple with one per operand).

    `types` are those of all inputs. `inputs` and `outputs` are anything indexed by position, a sequence or a dict that
    holds at least what `reads` names. `gradients` has an entry for each output, None where no gradient arrived."""
    rule = op.rules[0 if op.variadic else which]
    assert rule is not None, f"{op.name} has no gradient in operand {which}"
    arguments: list[Any] = []
    for kind, key in rule.sources:
        if kind == "gradient":
            g = gradients[key]
            arguments.append(_zero_gradient(op, attrs, types, key) if g is None else g)
        elif kind == "input":
            arguments.append(inputs[key])
        elif kind == "output":
            arguments.append(outputs[key])
        elif kind == "type":
            arguments.append(types[key])
        elif kind == "attr":
            arguments.append(attrs[key])
        else:
            arguments.append(_VARIADIC[kind](op, attrs, types, inputs, outputs, gradients))
    return rule.function(*arguments)


def _zero_gradient(op: Op, attrs: Mapping[str, Any], types: Sequence[TensorType], k: int) -> Any:
    return ops.zeros_like(op.result_types(tuple(types), dict(attrs))[k])


def _all_gradients(op: Op, attrs: Mapping[str, Any], types: Sequence[TensorType], inputs: Any, outputs: Any,
                   gradients: Sequence[Any]) -> tuple[Any, ...]:
    return tuple([_zero_gradient(op, attrs, types, k) if g is None else g for k, g in enumerate(gradients)])


_VARIADIC: dict[str, Callable[..., tuple[Any, ...]]] = {
    "gradients": _all_gradients,
    "types": lambda op, attrs, types, inputs, outputs, gradients: tuple(types),
    "inputs": lambda op, attrs, types, inputs, outputs, gradients: tuple([inputs[k] for k in range(len(types))]),
    "outputs": lambda op, attrs, types, inputs, outputs, gradients: tuple([outputs[k] for k in range(len(gradients))]),
}


def operand_gradients(op: Op, attrs: Mapping[str, Any], types: Sequence[TensorType], inputs: Any, outputs: Any,
                      gradients: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """One gradient per operand: None where it is not wanted or where the op is not differentiable in it."""
    if op.variadic:
        if not op.rules[0] or not any(wanted):
            return [None] * len(wanted)
        results = apply_rule(op, attrs, types, inputs, outputs, gradients, 0)
        return [r if want else None for r, want in zip(results, wanted, strict=True)]
    rules = op.rules or (None,) * len(wanted)
    return [apply_rule(op, attrs, types, inputs, outputs, gradients, k) if want and rules[k] is not None else None
            for k, want in enumerate(wanted)]


def depends_on(nodes: Iterable[Node], values: Collection[Value]) -> set[Value]:
    """`values`, and all results of `nodes` that a gradient flows through on its way to them."""
    found = set(values)
    for node in nodes:
        if not node.op.differentiable:
            continue
        rules = node.op.rules * len(node.inputs) if node.op.variadic else node.op.rules
        if any(v in found and rule is not None for v, rule in zip(node.inputs, rules, strict=True)):
            found.update(v for v in node.outputs if v.dtype.is_differentiable)
    return found


def reverse(nodes: Sequence[Node], seeds: Mapping[Value, Any], wrt: Collection[Value],
            at: Callable[[Node], Any] | None = None, read: Read | None = None) -> dict[Value, Any]:
    """The backward pass: gradients of `wrt`, given the gradients `seeds` of some values.

    Values are read by the rules as they are, so the current interpreter must be the one that `nodes` were made by (a
    GraphBuilder appends to them). `at` is called with each node before its rules run; `read`, given a node and the
    gradients that arrive at it, says which inputs and outputs the rules read instead of the node's own. A value of `wrt`
    that no gradient reaches is missing from the result."""
    flowing = depends_on(nodes, wrt)
    gradients: dict[Value, Any] = {v: g for v, g in seeds.items() if v in flowing}
    for node in reversed(nodes):
        arriving = [gradients.get(v) for v in node.outputs]
        if all(g is None for g in arriving):
            continue
        if at is not None:
            at(node)
        wanted = [v in flowing for v in node.inputs]
        types = [v.type for v in node.inputs]
        inputs, outputs = (node.inputs, node.outputs) if read is None else read(node, arriving)
        leaving = operand_gradients(node.op, node.attrs, types, inputs, outputs, arriving, wanted)
        for v, g in zip(node.inputs, leaving, strict=True):
            if g is not None:
                gradients[v] = ops.add(gradients[v], g) if v in gradients else g
    return {v: gradients[v] for v in wrt if v in gradients}


def continue_graph(graph: Graph) -> GraphBuilder:
    """A builder that goes on where `graph` ends. Values are never changed, so the two may share them."""
    builder = GraphBuilder(graph.name)
    builder.inputs, builder.nodes, builder.count = list(graph.inputs), list(graph.nodes), next_id(graph)
    return builder
