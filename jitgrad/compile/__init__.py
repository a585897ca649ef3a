"""Compiling functions: recording their calls, traced numbers, guards and sealing."""

from jitgrad.compile.api import CompiledFunction, compile

__all__ = ["CompiledFunction", "compile"]
