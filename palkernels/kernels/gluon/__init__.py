"""A forward kernel in Gluon for compute capability 9.x, whose warps are specialised."""
