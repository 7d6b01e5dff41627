"""The environment of all tests, and of the processes that they start.

pytest                  on a CPU; the Triton kernels run in Triton's interpreter
pytest --device cuda    on a GPU: the tests marked gpu, compiled
pytest --passed FILE    without the tests that FILE names; those that pass are added to it
"""

import gc
import multiprocessing
import os
from pathlib import Path

import pytest
from support.limits import pytest_runtest_protocol, restore_default_signals
from support.passed import Passed

__all__ = ["pytest_runtest_protocol"]  # every test's limit of time

collect_ignore = ["serving"]  # needs vLLM: make test-serving, which does not load this file

restore_default_signals()

# A child process imports the installed package, not the source tree that it happens to start in; and `support`.
os.environ["PYTHONSAFEPATH"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).parent / "lib")])
)

# What a fork server, and so each process that it forks, has imported.
multiprocessing.set_forkserver_preload(["support.sharded", "support.parallel", "support.commands", "support.samples"])


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where the kernels run")
    parser.addoption("--passed", type=Path, help="tests named in this file are left out, and what passes is added")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds on a CPU; make test leaves it to make test-slow")
    config.addinivalue_line("markers", "gpu: runs on a GPU too, with --device cuda")
    config.addinivalue_line("markers", "cuda_only: cannot run in the interpreter")
    if config.getoption("--passed") is not None:
        config.pluginmanager.register(Passed(config))
    gc.set_threshold(20_000)  # a twentieth of the time is garbage collection at Python's 700 new objects
    if config.getoption("--device") == "cpu":  # must be chosen before triton is imported
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config, items):
    on_gpu = config.getoption("--device") == "cuda"
    marker = "gpu" if on_gpu else "cuda_only"
    dropped = [item for item in items if (item.get_closest_marker(marker) is None) == on_gpu]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


def pytest_collection_finish():
    # The first backward pass of a process starts a thread for each device that there is, and what is forked afterwards
    # has no backward pass. Fake CUDA tensors make such a device, so the first pass comes before them.
    import torch

    torch.ones((), requires_grad=True).backward()
    gc.freeze()  # measurements collect garbage before every sample: let them not search a million objects of imports


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter(device):
    if device == "cpu":
        from support.interpreter import make_quick

        make_quick()
