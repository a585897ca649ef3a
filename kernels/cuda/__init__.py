"""What GPU kernels are written with: memory accesses, shuffles, approximations, pieces of matrix products."""
