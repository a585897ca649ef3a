"""Cyclic garbage collection, put off while a great many objects are made of which most stay.

Recording a step and making its plan make up to a million objects. Python's collector would go through them dozens of
times, and once through everything else that there is, and find nothing: that took up to a sixth of a first call.
"""

from __future__ import annotations

import gc
from typing import Any


class Uncollected:
    """A context in which no cyclic garbage is collected, up to its end or to `end`."""

    def __enter__(self) -> Uncollected:
        self._enabled = gc.isenabled()
        gc.disable()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.end()

    def end(self) -> None:
        """Collect garbage from here on, if that was so before."""
        if self._enabled:
            self._enabled = False
            gc.enable()
