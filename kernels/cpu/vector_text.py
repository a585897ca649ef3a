"""What pieces of LLVM text have in common: their attributes, and how they name vectors of floats, of `lanes` elements of
`bits` bits."""

from __future__ import annotations

from jitgrad import config


def attributes() -> str:
    """Those of a piece. Its loops use all vector registers, and its instructions stand in the order in which they should
    run; LLVM's models of some processors (AMD's with AVX-512 among them) move them about until sums have to wait in memory,
    which takes a third of a micro-kernel's time. So the model is that of a level of x86-64, the same everywhere."""
    tuned = config.processor().tuned
    return "noinline nounwind" + (f' "tune-cpu"="{tuned}"' if tuned else "")


class VectorText:
    """What the dataclasses of such pieces, which have `lanes` and `bits`, have in common."""

    __slots__ = ()
    lanes: int
    bits: int

    @property
    def suffix(self) -> str:
        """How the names of LLVM's vector intrinsics end."""
        return f"v{self.lanes}f{self.bits}"

    @property
    def element(self) -> str:
        return "float" if self.bits == 32 else "double"

    @property
    def vector(self) -> str:
        return f"<{self.lanes} x {self.element}>"
