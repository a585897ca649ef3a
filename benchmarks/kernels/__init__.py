"""Single kernels in all libraries, beside what the machine can do: `run` measures, the other modules say what."""
