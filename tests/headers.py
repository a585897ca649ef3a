"""What C headers of NVIDIA's say, for tests of bindings: values of constants, parameters of functions.

    header = Header.find("cuda.h")              # None where no package and no toolkit has it
    header.numbers["CU_EVENT_DISABLE_TIMING"]   # enumerators, and macros that are a number
    header.sizes("cuMemAlloc_v2")               # bytes of its parameters, each with those of what it points to
"""

import ast
import os
import re
import sys
from contextlib import suppress
from functools import cached_property
from pathlib import Path

SCALARS = {"char": 1, "unsigned char": 1, "unsigned short": 2, "int": 4, "unsigned int": 4, "unsigned": 4, "float": 4,
           "double": 8, "size_t": 8, "unsigned long long": 8, "long long": 8, "int32_t": 4, "uint32_t": 4, "int64_t": 8,
           "uint64_t": 8, "cudaStream_t": 8, "CUdeviceptr": 8, "CUdeviceptr_v2": 8, "CUdevice": 4, "CUdevice_v1": 4,
           "cuuint32_t": 4, "cuuint64_t": 8, "cudaDataType": 4, "cudaDataType_t": 4}
POINTER = 8


def folders():
    """Where headers lie: in packages, in toolkits."""
    for folder in sys.path:
        yield from sorted(Path(folder or ".").glob("nvidia/*/include"))
    yield from [Path(root) / "include" for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root]


class Header:
    """One header without comments, or several as one."""

    def __init__(self, text):
        self.text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)

    @classmethod
    def find(cls, *names):
        for folder in folders():
            if all((folder / name).is_file() for name in names):
                return cls("\n".join((folder / name).read_text("utf-8", "replace") for name in names))
        return None

    @cached_property
    def numbers(self):
        """Enumerators and macros by name, as far as they are integers made of integers."""
        found = {}
        for name, text in re.findall(r"#define\s+(\w+)[ \t]+(\S[^\n]*)", self.text):
            _note(found, name, re.sub(r"\(\(\w+\)\s*(\w+)\)", r"\1", text))          # without a cast
        for body in re.findall(r"\benum\b\s*\w*\s*\{(.*?)\}", self.text, re.DOTALL):
            value = -1
            for entry in re.sub(r"#[^\n]*", "", body).split(","):
                name, _, text = entry.partition("=")
                name = name.split()[0] if name.split() else ""               # what stands behind it says that it is old
                _note(found, name, text.strip() or str(value + 1))
                value = found.get(name, value)
        return found

    @cached_property
    def types(self):
        """Bytes of types by name: handles are pointers, enumerations are ints."""
        handles = re.findall(r"\btypedef\s+(?:struct\s+)?\w+\s*\*\s*(\w+)\s*;", self.text)
        enums = re.findall(r"\btypedef\s+enum\b[^{;]*\{[^}]*\}\s*(\w+)\s*;", self.text)
        return {**dict.fromkeys(handles, POINTER), **dict.fromkeys(enums, 4), **SCALARS}

    @cached_property
    def versions(self):
        """What functions are called in the library, by the name that programs use."""
        return dict(re.findall(r"#define\s+(cu\w+)\s+(cu\w+_v\d+|cuGraphInstantiateWithFlags)\b", self.text))

    def declared(self, name):
        """The parameters of the function called `name` in the library. The header declares it by the name that programs use,
        today's version first."""
        used = {library: program for program, library in self.versions.items()}
        found = re.findall(rf"\b{used.get(name, name)}\s*\(([^;{{}}()]*)\)\s*;", self.text)
        return next(iter(found))

    def sizes(self, name):
        """For each parameter its bytes, and of a pointer the bytes of what it points to (None: that is not known)."""
        text = self.declared(name)
        return [] if text.strip() in ("", "void") else [self.size(" ".join(part.split())) for part in text.split(",")]

    def size(self, parameter):
        words = re.sub(r"\bconst\b|\bstruct\b", " ", parameter)
        stars, kind = words.count("*") + words.count("["), " ".join(re.sub(r"\[\w*\]", "", words).replace("*", " ").split())
        while kind not in self.types and " " in kind:                        # the last word is the parameter's name
            kind = kind.rpartition(" ")[0]
        if stars:
            return POINTER, POINTER if stars > 1 else self.types.get(kind)
        return self.types[kind], None


def _note(found, name, text):
    plain = re.sub(r"\b(0x[0-9a-fA-F]+|\d+)[uUlL]+\b", r"\1", text)
    with suppress(SyntaxError, KeyError, ValueError):
        found[name] = _value(ast.parse(plain, mode="eval").body, found)


def _value(node, known):
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return known[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in (ast.BitOr, ast.LShift, ast.Add):
        left, right = _value(node.left, known), _value(node.right, known)
        return left | right if isinstance(node.op, ast.BitOr) else left << right if isinstance(node.op, ast.LShift) \
            else left + right
    raise ValueError
