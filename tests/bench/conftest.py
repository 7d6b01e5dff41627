"""The models here are too small for several threads, which only wait for each other on a busy machine."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def no_pictures() -> Iterator[None]:
    """Draw neither plot nor report, which take longer than these models do: `measured` and others draw them."""
    from palkernels.bench.report import files  # once Triton's interpreter has been chosen

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(files, "render", lambda document: b"")
        patches.setattr(files, "report_page", lambda document: "")
        yield


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    threads, given = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    yield
    torch.set_num_threads(threads)
    if given is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = given
