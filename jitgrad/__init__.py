"""jitgrad: a JIT-compiling deep-learning array framework in Python."""
