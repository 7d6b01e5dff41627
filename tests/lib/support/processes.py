"""Run a function in two processes at once, which are forked from one that has imported what takes seconds."""

import multiprocessing

import torch.multiprocessing

PRELOADED = ["support.sharded", "support.parallel"]


def run_in_two(function, *arguments):
    """Call ``function`` with the number of the process and the arguments; an error in either is raised here."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method="forkserver")
