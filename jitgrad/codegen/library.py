"""Primitives that have hand-written kernels: from a node to launches of texts from `jitgrad.kernels.cpu`.

`lower` is the entry; it gives None for an op, or for operands, that no kernel is written for: those become host
entries. The lowerings stand in one module per family; each enters itself into `LIBRARY` when it is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jitgrad.codegen import (
    convolution,
    library_attention,
    library_index,
    library_line,
    library_movement,
    library_recurrence,
    library_window,
    matmul,
)
from jitgrad.codegen.call import IN_PLACE, LIBRARY, Call
from jitgrad.codegen.kernel import Lowered
from jitgrad.ir.graph import Where
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType

FAMILIES = (convolution, library_attention, library_index, library_line, library_movement, library_recurrence,
            library_window, matmul)


def lower(op: Op, inputs: tuple[TensorType, ...], attrs: Mapping[str, Any], shared: tuple[tuple[int, int], ...] = (),
          where: Where = None) -> Lowered | None:
    """Launches for one node, or None when it has to be a host entry. `shared` are pairs (output, input) of one
    slot."""
    function = LIBRARY.get(op.name)
    if function is None or any(t.dtype.is_complex or t.device != "cpu" for t in inputs):
        return None
    if shared and shared != (IN_PLACE.get(op.name),):
        return None
    return function(Call(inputs, op.result_types(inputs, dict(attrs)), attrs, dict(shared)))
