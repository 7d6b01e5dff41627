"""The environment of every test and of the processes that tests start."""

import os

# A child process imports the installed package, not the source tree that it happens to start in.
os.environ["PYTHONSAFEPATH"] = "1"
# The Triton kernels run in Triton's interpreter, which must be chosen before triton is imported.
os.environ["TRITON_INTERPRET"] = "1"
