"""Compiling functions: recording their calls, traced numbers, guards and sealing; the receipt and the verification."""

from jitgrad.compile.api import CompiledFunction, compile
from jitgrad.compile.receipt import Receipt, compare
from jitgrad.compile.verification import Verification, verify

__all__ = ["CompiledFunction", "Receipt", "Verification", "compare", "compile", "verify"]
