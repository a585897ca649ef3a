"""What the machine code of a kernel must be like: assertions on a `Cubin` and on listings by `cuda_toolchain.disassemble`.

A listing is the list of instructions of one kernel, such as ``@P0 LDG.E.128 R4, desc[UR6][R2.64]``. Mnemonics are those
that NVIDIA's tools print: LDG and STG access global memory, LDS and STS shared memory, LDL and STL local memory (what does
not fit into registers), HMMA is a product on tensor cores, a D in front is arithmetic in float64.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from jitgrad.codegen.cuda_toolchain import Cubin


def opcodes(listing: Sequence[str]) -> Counter[str]:
    """How often each opcode occurs, without conditions and operands."""
    return Counter(re.sub(r"^@!?\w+\s+", "", line).split()[0] for line in listing)


def assert_no_spills(cubin: Cubin) -> None:
    """No kernel keeps registers, or anything else, in local memory."""
    for name, used in cubin.kernels.items():
        assert (used.stack, used.spill_stores, used.spill_loads) == (0, 0, 0), f"{name} on {cubin.architecture}: {used}"


def innermost_loop(listing: Sequence[str], opcode: str) -> list[str]:
    """The shortest loop with an instruction that begins so, from where the branch at its end goes to that branch; the
    listing is one with labels."""
    places, found = {line[:-1]: k for k, line in enumerate(listing) if line.endswith(":")}, list[list[str]]()
    for k, line in enumerate(listing):
        branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if branch and places[branch[1]] < k:
            body = [line for line in listing[places[branch[1]]:k + 1] if not line.endswith(":")]
            found += [body] if any(code.startswith(opcode) for code in opcodes(body)) else []
    assert found, f"{opcode} is in no loop"
    return min(found, key=len)


def assert_wide(listing: Sequence[str], bits: int = 128) -> None:
    """All accesses of global memory, of which there is one, have this width."""
    found = {code for code in opcodes(listing) if code.startswith(("LDG", "STG"))}
    narrow = {code for code in found if str(bits) not in code.split(".")}
    assert found, "the kernel does not access global memory"
    assert not narrow, f"not {bits} bits wide: {sorted(narrow)}"


def assert_no_double(listing: Sequence[str]) -> None:
    """Nothing is computed in float64, nor converted to or from it."""
    pattern = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)\b|.*\.F64\b|MUFU\.\w*64H")
    double = sorted(code for code in opcodes(listing) if pattern.match(code))
    assert not double, f"float64: {double}"


def assert_tensor_cores(listing: Sequence[str]) -> None:
    """There are products on tensor cores."""
    assert any(code.startswith(("HMMA", "HGMMA", "UTCHMMA")) for code in opcodes(listing)), "no product on tensor cores"
