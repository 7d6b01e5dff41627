"""Every module is in the wheel, and imports alone."""

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

# Forks a process for each module. What they all find imported is other people's packages, which take seconds.
IMPORT_ALONE = """
import importlib, os, sys, traceback
import matplotlib.figure, rich.progress, torch, transformers, triton.language, typer
import transformers.models.auto.modeling_auto, transformers.models.whisper.modeling_whisper
import transformers.models.blip_2.modeling_blip_2, transformers.models.clap.modeling_clap
import transformers.models.clap.feature_extraction_clap, transformers.models.whisper.feature_extraction_whisper

assert not [name for name in sys.modules if name.split(".")[0] == "palkernels"]
for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(module)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        print(module)
"""


def tree(pattern: str) -> dict[Path, Path]:
    """Files of the source tree, by where they are installed beside the package ``palkernels``."""
    return {
        Path(*package.split(".")) / path.relative_to(ROOT / folder): path
        for package, folder in SETTINGS["package-dir"].items()
        for path in sorted((ROOT / folder).rglob(pattern))
    }


def test_every_module_imports_alone(tmp_path):
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in tree("*.py")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", IMPORT_ALONE, *modules, "palkernels.no_such_module"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["palkernels.no_such_module"], done.stderr
    assert "No module named 'palkernels.no_such_module'" in done.stderr


def test_every_folder_with_modules_is_a_package_of_the_wheel():
    files = tree("*.py")
    folders = {path.parent for path in files}
    assert {".".join(folder.parts) for folder in folders} == set(SETTINGS["packages"])
    for folder in folders:
        assert files[folder / "__init__.py"].read_text().startswith('"""'), f"{folder} must say what lives there"


@pytest.mark.skipif(os.environ.get("PALKERNELS_TEST_WHEEL") != "1", reason="an editable install reads the source tree")
def test_the_wheel_holds_the_modules_and_their_data_and_nothing_else():
    expected = {*tree("*.py")}
    for package, patterns in SETTINGS["package-data"].items():
        folder = Path(*package.split("."))
        files = [path for path, source in tree("*").items() if source.is_file()]
        expected |= {path for path in files if any(path.match(str(folder / pattern)) for pattern in patterns)}
    installed = Path(importlib.util.find_spec("palkernels").origin).parent
    files = [path for path in installed.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.relative_to(installed.parent) for path in files} == expected
    assert Path("palkernels/bench/report/report.html") in expected


def test_every_file_fits_a_sitting():
    """350 lines at most; a longer one says why in its docstring, and here."""
    root = Path(__file__).parents[1]
    folders = ("palkernels", "model", "bench", "scripts", "examples", "tests")
    files = [path for folder in folders for path in (root / folder).rglob("*.py")]
    assert len(files) > 200
    assert [str(path) for path in files if len(path.read_text().splitlines()) > 350] == []
