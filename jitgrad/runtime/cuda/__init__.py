"""What happens on NVIDIA GPUs: the driver, memory, streams, kernels, launches, and arrays in device memory.

Nothing is loaded and no driver is looked for before the first use. `driver` binds the driver's functions, `memory` and
`pinned` lend memory, `streams` orders work, `module` loads machine code, which `code` finds or has made, `launch` and
`walk` run plans of kernels, `plan` carries out a `PlanSpec`, `array` is the array that a Tensor on a GPU holds, `dlpack`
gives it to other libraries, and `dispatch` is where eager execution of ops on such arrays begins.
"""
