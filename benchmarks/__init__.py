"""Measurements of jitgrad beside PyTorch and JAX. ``python -m benchmarks --help`` says what can be measured.

Nothing is imported here: the programs that measure imports and first calls start in this package too.
"""
