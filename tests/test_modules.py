"""Every module is in the wheel, and imports alone."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

# Forks a process for each module, from one that has imported its package, as Python always does first; the first of all
# from one that has imported what takes seconds, other people's packages. Those of a package that import none of ours
# share one.
IMPORT_ALONE = """
import gc, importlib, os, sys, traceback
import matplotlib.backends.backend_agg, matplotlib.figure, rich.progress, torch, torch.utils.flop_counter
import transformers, triton.language, typer
import transformers.models.auto.modeling_auto, transformers.models.whisper.modeling_whisper
import transformers.models.blip_2.modeling_blip_2, transformers.models.clap.modeling_clap
import transformers.models.clap.feature_extraction_clap, transformers.models.whisper.feature_extraction_whisper
import transformers.models.llama.configuration_llama, transformers.models.qwen2.configuration_qwen2

assert not [name for name in sys.modules if name.split(".")[0] == "palkernels"]
gc.freeze()  # a process that looks for garbage copies the memory that it shares
gc.disable()
children = {}  # what is in a package: groups of modules
for group in map(str.split, sys.argv[1:]):
    children.setdefault(group[0].rpartition(".")[0], []).append(group)

def import_alone(group):
    child = os.fork()
    if child == 0:
        try:
            for module in group:
                if module == "palkernels.model.training":  # elsewhere these would only make every fork slower
                    import peft, transformers.trainer
                importlib.import_module(module)
                for each in children.get(module, []):
                    import_alone(each)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        print(*group, flush=True)

import_alone(["palkernels"])
"""


def tree(pattern: str) -> dict[Path, Path]:
    """Files of the source tree, by where they are installed beside the package ``palkernels``."""
    return {
        Path(*package.split(".")) / path.relative_to(ROOT / folder): path
        for package, folder in SETTINGS["package-dir"].items()
        for path in sorted((ROOT / folder).rglob(pattern))
    }


@pytest.mark.slow
def test_every_module_imports_alone(tmp_path):
    groups = {"palkernels.no_such_module": ["palkernels.no_such_module"]}
    for installed, path in tree("*.py").items():
        module = ".".join(installed.with_suffix("").parts).removesuffix(".__init__")
        if module.startswith("palkernels.model.vllm.") and importlib.util.find_spec("vllm") is None:
            continue  # only the room of its plugin needs it, but to be found
        ours = path.name == "__init__.py" or re.search(r"^\s*(from|import) (palkernels|\.)", path.read_text(), re.M)
        groups.setdefault(module if ours else module.rpartition(".")[0] + ".*", []).append(module)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", IMPORT_ALONE, *map(" ".join, groups.values())]
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
