"""What a GPU may do about matrix products beside computing them as they are written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Products:
    """What is allowed: `tf32`, that factors in float32 are rounded to TF32."""

    tf32: bool = False

    @property
    def key(self) -> str:
        """What lowering depends on, as text."""
        return "tf32" if self.tf32 else ""


EXACT = Products()
"""Nothing is."""
