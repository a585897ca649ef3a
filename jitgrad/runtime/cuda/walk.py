"""Many launches by one call from Python: a native loop over a table of prepared launches.

The table has a row of `COLUMNS` 64-bit words per launch: kernel, grid (3), block (3), bytes of shared memory, and the
place of its arguments. The loop is LLVM text, built at the first use of a plan.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from jitgrad import objectfile
from jitgrad.runtime import native

COLUMNS = 9
_TEXT = """
define i64 @{symbol}(ptr %table, i64 %count, i64 %stream, ptr %launch) {{
entry:
  %nothing = icmp eq i64 %count, 0
  br i1 %nothing, label %done, label %loop
loop:
  %k = phi i64 [ 0, %entry ], [ %next, %more ]
  %row = getelementptr [{columns} x i64], ptr %table, i64 %k
{loads}
  %code = call i32 %launch(i64 %w0, {sizes}, i64 %stream, i64 %w8, i64 0)
  %bad = icmp ne i32 %code, 0
  br i1 %bad, label %failed, label %more
more:
  %next = add i64 %k, 1
  %last = icmp eq i64 %next, %count
  br i1 %last, label %done, label %loop
failed:
  %wide = zext i32 %code to i64
  %high = shl i64 %k, 32
  %both = or i64 %high, %wide
  ret i64 %both
done:
  ret i64 0
}}
"""


def _text() -> str:
    loads = []
    for column in range(COLUMNS):
        loads.append(f"  %p{column} = getelementptr i64, ptr %row, i64 {column}\n  %w{column} = load i64, ptr %p{column}")
        if 1 <= column <= 7:
            loads.append(f"  %t{column} = trunc i64 %w{column} to i32")
    sizes = ", ".join(f"i32 %t{column}" for column in range(1, 8))
    return _TEXT.format(symbol=objectfile.SYMBOL, columns=COLUMNS, loads="\n".join(loads), sizes=sizes)


@cache
def walker() -> Any:
    """``walk(table, count, stream, launch)`` on addresses: 0, or the number of the launch that failed in the high half and
    the driver's code in the low half. The GIL is released."""
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    return kind(native.assemble(_text()))
