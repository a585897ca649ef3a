"""The hand-written kernels that most programs meet, for compiling them before the first one does."""

from __future__ import annotations

import re
from collections.abc import Iterator

from jitgrad.kernels.cpu import (
    attention,
    conv,
    depthwise,
    gemm,
    gemm_pack,
    gemm_rows,
    index,
    movement,
    planes,
    pooling,
    random,
    recurrence,
    scan,
    sort,
    tape,
    taps,
    winograd,
)


def sources(element: str = "f32") -> list[tuple[str, str]]:
    """Text and name of each: the loops that run plans, products and convolutions of `element`, attention, recurrent
    layers, pooling, indexing by int64, sorting, scans, copies and random bits."""
    return [(text, found[1]) for text in _texts(element) if (found := re.search(r"def (\w+)\(", text))]


def _texts(element: str) -> Iterator[str]:
    yield from map(tape.source, ("run", "side_by_side", "worker", "wake"))
    yield gemm.source(element)
    yield gemm_rows.source(gemm_rows.Lines(element, element, element))
    for kind in gemm_pack.PACK_KINDS:
        yield gemm_pack.pack_source(element, kind)
    for source in (conv.convolve_source, conv.weight_source, conv.add_parts_source, conv.interleave_source):
        yield source(element)
    for family in (pooling, index, sort, scan, movement, attention, taps, depthwise, planes):
        for name in family.KERNELS:
            yield family.source(name, element)
    for name in recurrence.KERNELS:
        yield from [recurrence.source(name, element, rows) for rows in (1, 8)]
    yield recurrence.sum_source(element)
    for way, names in winograd.KERNELS_OF.items():
        for name in names:
            yield winograd.source(name, element, way)
    halved = (1, 2, 2)
    for name in ("max_pool_rows", "max_pool_grad_tiles"):
        yield pooling.source(name, element, "u8", halved, halved, (0, 0, 0), (1, 1, 1))
    yield pooling.mean_windows_source(element, halved, halved)
    yield pooling.mean_gradient_source(element, halved, halved)
    yield random.source("random_bits")
