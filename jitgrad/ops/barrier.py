"""The op that keeps apart what is computed twice on purpose.

A recomputed value is a node like the one that it repeats, so common subexpressions would make one of the two again.
Operands that pass through a `barrier` are other values, which exist only when `after` is there: what reads them can
neither be merged with the first computation nor run before `after`. In a plan a barrier costs nothing: its result lies
in the memory of its operand.
"""

from __future__ import annotations

from jitgrad.ir.op import Op, register

__all__ = ["barrier"]

barrier: Op = register(Op(
    "barrier", ("x", "after"), lambda x, after: x, lambda x, after: x, "movement", alias=True,
    vjp=(lambda g: g, None),
    doc="x, once `after` (of any type) has been computed."))
