"""From a hand-written kernel to the text of it for given element types.

A hand-written kernel is an ordinary Python function ``(args, begin, end, thread)`` in its module. It names the types
of its operands by placeholders (`T`, `I`), and imports the vocabulary of kernel text from `standins`, so that it can
be read, checked and run as it stands. `text` spells it for real types.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any


@functools.cache
def _source(kernel: Callable[..., Any]) -> str:
    return inspect.getsource(kernel)


def text(kernel: Callable[..., Any], **replacements: str) -> str:
    """The text of `kernel` with every placeholder replaced, under a name that says for which types it is. Types go by
    their short names; bool is spelled ``boolean`` in kernel text."""
    source = _source(kernel)
    suffix = ""
    for placeholder, name in replacements.items():
        source, count = re.subn(rf"\b{placeholder}\b", "boolean" if name == "bool" else name, source)
        suffix += f"_{name}" if count and name.isidentifier() else ""
    return source.replace(f"def {kernel.__name__}(", f"def {kernel.__name__}{suffix}(")
