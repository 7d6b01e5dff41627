"""The kernels by themselves: the microbenchmark and its peers, and what each tile compiles to."""
