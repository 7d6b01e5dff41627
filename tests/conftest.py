"""The environment of every test and of the processes that tests start."""

import os

import torch

# A child process imports the installed package, not the source tree that it happens to start in.
os.environ["PYTHONSAFEPATH"] = "1"
# Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
