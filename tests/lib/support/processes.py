"""Processes that are forked from one that has imported what takes seconds: tests/conftest.py says what."""

import multiprocessing

import torch.multiprocessing

FORKED = multiprocessing.get_context("forkserver")


def run_in_two(function, *arguments):
    """Call ``function`` with the number of the process and the arguments; an error in either is raised here."""
    torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method="forkserver")
