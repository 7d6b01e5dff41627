"""Compile models in graphs that are counted, and kernels in fresh processes: here the interpreter is in the way."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import CompileConfig


def in_whole_graphs(backend=None):
    """Return a list that graphs are added to, and the options with which ``generate`` compiles its steps on a CPU."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    config = CompileConfig(fullgraph=True, backend=backend or count, mode=None)
    config._compile_all_devices = True
    return graphs, {"cache_implementation": "static", "compile_config": config}


def compile_ahead(jobs, folder):
    """Return a list of result rows for each job; a job is the arguments of ``python -m``, the module first."""

    def run(job):
        lines = run_compiling(["-m", *map(str, job)], folder)
        return [json.loads(line) for line in lines]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, jobs))


def run_compiling(arguments, folder):
    """Run Python with these arguments, Triton's cache in ``folder`` and no interpreter; return the lines it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
