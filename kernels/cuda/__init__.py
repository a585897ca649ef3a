"""What GPU kernels are written with: threads, memory accesses, shuffles, pieces of matrix products."""
