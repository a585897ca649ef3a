"""Ops that eager execution carries out by the kernels of compiled functions, where operands are large enough.

`carry_out` is given an op on arrays and gives its result, or None where NumPy is to do it: for small operands, for other
types than float32 and float64, and where no compiling is wanted. `rewrite` is the same for an op whose results replace the
contents of operands. Operands that are transposed or expanded are taken as they lie. The plan of an op on given types is
made once, as every plan is, and kept; of an op that NumPy does as exactly, when it is asked for again. An optimizer's update
of few elements has so many calls of NumPy that kernels take half of the time, too, but only a long run pays their compiling.
Kernels hold no sizes, so they are compiled once for a machine; those that are written by hand are compiled ahead by
``jitgrad cache build``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from jitgrad import config, precision
from jitgrad.dtypes import float32, float64, from_numpy
from jitgrad.ir.graph import attrs_key
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType
from jitgrad.movement import Chain, dense_base
from jitgrad.ops.blocks import SHARED
from jitgrad.plans import compile_graph
from jitgrad.runtime.plan import Plan
from jitgrad.single import Question, overlap

KINDS = ("contraction", "window", "scan", "sort", "foreach", "region")
BY_NUMPY = ("int_matmul", "cumsum", "cumprod")                          # one pass, or no floats
USUALLY = 1 << 16                                               # elements of all operands from which a plan pays
OFTEN = 500                                                     # updates of few elements after which it does
FLOATS = (float32, float64)


def carries_out(op: Op) -> bool:
    """Whether there is anything to gain for this op."""
    return op.exact or (op.kind in KINDS and op.name not in BY_NUMPY and not op.view)


def carry_out(op: Op, arrays: Sequence[np.ndarray], attrs: dict[str, Any]) -> Any:
    """The result of `op`, or a tuple of them; None where NumPy is to do it."""
    if not _pays(op, arrays):
        return None
    taken = [_operand(a) for a in arrays]
    plan = _plan_for(op, taken, attrs, ())
    if plan is None:
        return None
    results = plan.run([base for base, _ in taken])
    return results[0] if op.outputs == 1 else tuple(results)


def rewrite(op: Op, arrays: Sequence[np.ndarray], attrs: dict[str, Any], targets: Sequence[np.ndarray]) -> bool:
    """Replace the contents of `targets`, which are operands, by the results of `op`. False where NumPy is to do it, or where
    operands are not in one piece or share memory; then nothing has changed."""
    places = {id(a): k for k, a in enumerate(arrays)}
    written = tuple([places.get(id(t), -1) for t in targets])
    if -1 in written or not all([a.flags.c_contiguous for a in arrays]) or not _pays(op, arrays):
        return False
    plan = _plan_for(op, [(a, ()) for a in arrays], attrs, written)
    if plan is None or _share_memory(arrays, len(places)):
        return False
    plan.run(arrays)
    return True


def _share_memory(arrays: Sequence[np.ndarray], different: int) -> bool:
    """Whether any two do. Those that own their memory, and are as many objects, do not; addresses take long to ask for."""
    if different == len(arrays) and all([a.flags.owndata for a in arrays]):
        return False
    return overlap([(a.__array_interface__["data"][0], a.nbytes) for a in arrays])


def _pays(op: Op, arrays: Sequence[np.ndarray]) -> bool:
    settings = config.current()
    if settings.disable or settings.plain:
        return False
    if op.kind == "elementwise":
        return arrays[0].size >= SHARED
    return op.kind == "foreach" or sum([a.size for a in arrays]) >= USUALLY


def _operand(array: np.ndarray) -> tuple[np.ndarray, Chain]:
    """An array in one piece, and the movement that makes `array` of it; a copy where its elements lie too oddly."""
    if array.flags.c_contiguous:
        return array, ()
    found = dense_base(array.shape, array.strides)
    if found is None:
        return np.ascontiguousarray(array), ()
    base = array[(*[0 if gone else slice(None) for gone in found.gone], ...)].transpose(found.order)
    return (base, found.chain) if base.flags.c_contiguous else (np.ascontiguousarray(array), ())


def _plan_for(op: Op, taken: Sequence[tuple[np.ndarray, Chain]], attrs: dict[str, Any],
              written: tuple[int, ...]) -> Plan | None:
    answer = _answer(op, attrs_key(attrs), written, precision.allows_less(),
                     *[(base.dtype, base.shape, chain) for base, chain in taken])
    if answer.plan is None and answer.open:
        answer.asked += 1
        few = op.kind == "foreach" and sum([base.size for base, _ in taken]) < USUALLY
        if answer.asked > (OFTEN if few else int(op.exact)):
            answer.plan, answer.open = _make_plan(op, attrs, taken, written), False
    return answer.plan


class _Answer:
    """The plan of a question, once it is made; `open`: it may still be made."""

    __slots__ = ("asked", "open", "plan")

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.asked, self.open = 0, True


@lru_cache(maxsize=1024)
def _answer(op: Op, attrs: Any, written: tuple[int, ...], less_exact: bool,
            *operands: tuple[np.dtype, tuple[int, ...], Chain]) -> _Answer:
    """What is known about such a question. Eager steps ask many: its parts are such as Python compares natively."""
    return _Answer()


def _make_plan(op: Op, attrs: dict[str, Any], taken: Sequence[tuple[np.ndarray, Chain]],
               written: tuple[int, ...]) -> Plan | None:
    """None if NumPy would carry it out there, too, or if it is not for wide floats."""
    types = [TensorType(from_numpy(base.dtype), base.shape) for base, _ in taken]
    graph = Question(op, attrs).graph(types, [chain for _, chain in taken], written)
    if not all([t.dtype in FLOATS for t in (*types[:1], graph.results[0].type)]):
        return None
    plan = compile_graph(graph)
    return plan if isinstance(plan, Plan) and all(entry.host is None for entry in plan.spec.entries) else None
