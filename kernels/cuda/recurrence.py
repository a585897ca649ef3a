"""Recurrent weights in the order in which the kernel of the steps reads them (`codegen.cuda_steps`)."""

from __future__ import annotations

from jitgrad.kernels.cuda.standins import N, T, block, load, pointer, quotient, rest, store, thread


def pack_weights(w: pointer[T], o: pointer[T], elements: N, lanes: N, depth: N, padded_depth: N, gates: N, units: N,
                 hidden: N, gate_step: N, unit_step: N, depth_step: N) -> block[256]:
    """o[tile of units, padded_depth, 32, lanes]: of its `lanes` elements, lane number j has those of gate 0, 1 … of unit
    ``tile * units * 32 + j``, then those of the unit 32 further on, up to `units`; zeros where there is no element. w has
    the three steps from gate to gate, from unit to unit, along the `depth`."""
    item = N(N(block() * N(256)) + thread())
    if item < elements:
        column = rest(item, lanes)
        row = quotient(item, lanes)
        k = rest(quotient(row, N(32)), padded_depth)
        tile = quotient(quotient(row, N(32)), padded_depth)
        group = quotient(column, gates)
        unit = N(N(N(N(tile * units) + group) * N(32)) + rest(row, N(32)))
        value = T(0)
        if group < units and unit < hidden and k < depth:
            gate = N(rest(column, gates) * gate_step)
            value = load(w, N(N(gate + N(unit * unit_step)) + N(k * depth_step)), 0, 2)
        store(o, item, value, 1, 2)
