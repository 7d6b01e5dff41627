"""Compile kernels in fresh processes: in the tests' own the interpreter has taken the compiler's place."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor


def compile_ahead(jobs, folder):
    """Return a list of result rows for each job; a job is the arguments of ``python -m palkernels.kernels.aot``."""

    def run(job):
        lines = run_compiling(["-m", "palkernels.kernels.aot", *map(str, job)], folder)
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
