"""The plugin is found by vLLM, alone knows it, and says which release it needs."""

import importlib
import os
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest

from palkernels.model.vllm import versions

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(os.environ.get("PALKERNELS_TEST_WHEEL") != "1", reason="an editable install has older metadata")
def test_vllm_finds_it():
    (found,) = [point for point in entry_points(group="vllm.general_plugins") if point.name == "palkernels"]
    assert found.load() is importlib.import_module("palkernels.model.vllm").register


@pytest.mark.slow
def test_importing_it_imports_no_vllm():
    probe = "import sys, palkernels.model.vllm; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], check=True)


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.32.0", True), ("0.32.4.post1", True), ("0.32.1rc2+cpu", True), ("0.32rc1", True), ("0.320.0", False),
     ("0.33.0", False), ("0.31.9", False), ("1.0.32", False)],
)  # fmt: skip
def test_releases(version, supported):
    assert versions.is_supported(version) is supported


def test_extra_tests_and_docs_say_the_same_release():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["vllm"]
    major, _, minor = versions.SUPPORTED.partition(".")
    assert f"vllm[audio]>={versions.SUPPORTED},<{major}.{int(minor) + 1}" in extra
    assert f"\nvllm-cpu=={versions.SUPPORTED}." in (ROOT / "constraints-serving.txt").read_text()
    assert f"| vLLM | {versions.SUPPORTED} | {versions.SUPPORTED} |" in (ROOT / "docs" / "support.md").read_text()


def test_another_release_is_refused_where_a_model_loads(monkeypatch):
    """Not before: whoever has both installed serves other models with it."""
    registered = {}
    other = SimpleNamespace(
        __version__="0.40.0",
        ModelRegistry=SimpleNamespace(register_model=lambda name, path: registered.update({name: path})),
    )
    monkeypatch.setitem(sys.modules, "vllm", other)
    importlib.import_module("palkernels.model.vllm").register()
    ((name, path),) = registered.items()
    module, _, attribute = path.partition(":")
    assert name == attribute == "PalForConditionalGeneration"
    with pytest.raises(ImportError, match=r"vllm must be 0\.32\.\* to serve audio LLMs, got 0\.40\.0"):
        getattr(importlib.import_module(module), attribute)
