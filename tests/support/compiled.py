"""Tiles compiled ahead of time, in fresh processes: in a test's own the interpreter has taken the compiler's place."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor


def compile_ahead(jobs, folder):
    """One list of rows per job; a job is the arguments of ``python -m palkernels.kernels.aot``."""

    def run(job):
        lines = run_compiling(["-m", "palkernels.kernels.aot", *map(str, job)], folder)
        return [json.loads(line) for line in lines]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, jobs))


def run_compiling(arguments, folder):
    """Lines that a Python process prints in which Triton compiles, with its cache in ``folder``."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
