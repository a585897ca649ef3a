"""How pieces of LLVM text name their vectors of floats: of `lanes` elements of `bits` bits."""

from __future__ import annotations


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
