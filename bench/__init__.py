"""What measures the kernels and the models: microbenchmarks, Figure 1 measured and simulated, and the command."""
