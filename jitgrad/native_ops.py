"""Ops that eager execution carries out by the kernels of compiled functions, where operands are large enough.

`carry_out` is given an op on arrays and gives its result, or None where NumPy is to do it: for ops that NumPy does in one
call, small operands, and where no compiling is wanted. `rewrite` is the same for an op whose results replace the contents
of operands. The plan of an op on given types is made once, as every plan is, and kept. Its kernels hold no sizes, so they
are compiled once for a machine; those that are written by hand are compiled ahead by ``jitgrad cache build``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from jitgrad import config, ops
from jitgrad.dtypes import float32, float64, from_numpy
from jitgrad.ir.graph import GraphBuilder, attrs_key
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType
from jitgrad.ops.contraction import transposed
from jitgrad.ops.derived import Derived
from jitgrad.plans import compile_graph
from jitgrad.runtime.plan import Plan

KINDS = ("contraction", "window", "scan", "sort", "foreach", "region")
BY_NUMPY = ("int_matmul", "cumsum", "cumprod", "sort")                  # one pass, or no floats
ENOUGH = 1 << 16                                                # elements of all operands from which a plan pays
FLOATS = (float32, float64)


def carries_out(op: Op) -> bool:
    """Whether there is anything to gain for this op."""
    return op.kind in KINDS and op.name not in BY_NUMPY and not op.view


def carry_out(op: Op, arrays: Sequence[np.ndarray], attrs: dict[str, Any]) -> Any:
    """The result of `op`, or a tuple of them; None where NumPy is to do it."""
    plan, turned = _plan_for(op, arrays, attrs, ())
    if plan is None:
        return None
    results = plan.run([np.ascontiguousarray(a.swapaxes(-1, -2) if turn else a)
                        for a, turn in zip(arrays, turned, strict=True)])
    return results[0] if op.outputs == 1 else tuple(results)


def rewrite(op: Op, arrays: Sequence[np.ndarray], attrs: dict[str, Any], targets: Sequence[np.ndarray]) -> bool:
    """Replace the contents of `targets`, which are operands, by the results of `op`. False where NumPy is to do it, or where
    operands are not in one piece or share memory; then nothing has changed."""
    places = {id(a): k for k, a in enumerate(arrays)}
    written = tuple([places.get(id(t), -1) for t in targets])
    if -1 in written or not all([a.flags.c_contiguous for a in arrays]):
        return False
    plan, _ = _plan_for(op, arrays, attrs, written)
    if plan is None or _overlap(arrays):
        return False
    plan.run(arrays)
    return True


def _plan_for(op: Op, arrays: Sequence[np.ndarray], attrs: dict[str, Any],
              written: tuple[int, ...]) -> tuple[Plan | None, tuple[bool, ...]]:
    """The plan, and which operands it takes with the last two dimensions swapped."""
    settings = config.current()
    if sum([a.size for a in arrays]) < ENOUGH or settings.disable or settings.plain:
        return None, ()
    turned = tuple([op is ops.matmul and not a.flags.c_contiguous and a.swapaxes(-1, -2).flags.c_contiguous for a in arrays])
    types = tuple([TensorType(from_numpy(a.dtype), a.shape) for a in arrays])
    return _plan(_Question(op, attrs), types, attrs_key(attrs), turned, written), turned


def _overlap(arrays: Sequence[np.ndarray]) -> bool:
    """Whether any two share memory."""
    spans = sorted([(a.__array_interface__["data"][0], a.nbytes) for a in arrays])
    return any([place + nbytes > following for (place, nbytes), (following, _) in pairwise(spans)])


class _Question:
    """An op with attributes. Two are equal if the ops are: the attributes' key is compared beside them."""

    __slots__ = ("attrs", "op")

    def __init__(self, op: Op, attrs: dict[str, Any]):
        self.op = op
        self.attrs = attrs

    def __hash__(self) -> int:
        return hash(self.op.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Question) and self.op is other.op


@lru_cache(maxsize=1024)
def _plan(question: _Question, types: tuple[TensorType, ...], key: Any, turned: tuple[bool, ...],
          written: tuple[int, ...]) -> Plan | None:
    """None if NumPy would carry it out there, too, or if it is not for wide floats."""
    op, attrs = question.op, question.attrs
    if not all(t.dtype in FLOATS for t in (*types[:1], *op.result_types(types, attrs)[:1])):
        return None
    builder = GraphBuilder(op.name)
    operands = [builder.input(t.with_shape((*t.shape[:-2], t.shape[-1], t.shape[-2])) if turn else t)
                for t, turn in zip(types, turned, strict=True)]
    with builder:
        taken = [transposed(v) if turn else v for v, turn in zip(operands, turned, strict=True)]
        made = op.definition(*taken, **attrs) if isinstance(op, Derived) else builder.run(op, tuple(taken), attrs)
    results = list(made) if isinstance(made, tuple) else [made]
    graph = builder.build([] if written else results, list(zip(written, results, strict=True)) if written else [])
    plan = compile_graph(graph)
    return plan if isinstance(plan, Plan) and all(entry.host is None for entry in plan.spec.entries) else None
