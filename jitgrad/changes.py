"""One counter for all the state that a compiled function takes for granted.

It goes up with every change of a Module's attributes, structure or mode, of a Tensor's ``requires_grad`` or the
presence of its ``.grad``, and of an optimizer's param groups. Equal counts mean that none of these changed in between,
so the guards that read them need not be checked again. Values (weights, learning rates) do not count: they are read
anew by every call.
"""

from __future__ import annotations

count: int = 0


def bump() -> None:
    """Note one change. Two threads may share an increment: the count only ever has to differ from what it was."""
    global count
    count += 1
