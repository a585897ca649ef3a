"""Texts of kernels for tests, written by hand."""

from collections.abc import Sequence


def kernel(body: str, parameters: Sequence[str] = ("u64", "u64"), declarations: str = "") -> str:
    """A kernel called k: its parameters of 64 bits are in %rd0, %rd1, …, one of 32 bits is in %r1, and the number of the
    thread in its block is in %r0."""
    listed = ", ".join(f".param .{kind} p{k}" for k, kind in enumerate(parameters))
    loads = "".join(f"ld.param.{kind} %{'rd' if kind == 'u64' else 'r1'}{k if kind == 'u64' else ''}, [p{k}];\n"
                    for k, kind in enumerate(parameters))
    return f"""
.version 8.0
.target sm_80
.address_size 64
{declarations}
.visible .entry k({listed})
{{
.reg .pred %p<10>; .reg .b16 %h<20>; .reg .b32 %r<40>; .reg .f32 %f<40>; .reg .b64 %rd<40>; .reg .f64 %d<20>;
{loads}mov.u32 %r0, %tid.x;
{body}
ret;
}}
"""
