"""The README's code runs, and its figures are those of the committed results."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", CODE, ids=range(len(CODE)))
def test_code_runs(code):
    exec(compile(code, "README.md", "exec"), {})


def test_there_is_code():
    assert len(CODE) >= 2
    assert any("attach(" in code for code in CODE)


def test_figures_come_from_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "update_readme.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_results_show_what_the_readme_says():
    """From 512 audio tokens on LAL is ahead of PLITS in everything, and by a wide margin above the static part."""
    rows = json.loads((ROOT / "bench" / "results" / "figure1-cpu.json").read_text())["rows"]
    found = {(row["method"], row["mode"], row["audio_tokens"]): row for row in rows}
    compared = 0
    for (method, mode, tokens), lal in found.items():
        if method == "lal" and tokens >= 512:
            plits = found["plits", mode, tokens]
            assert lal["samples_per_second"]["p50"] > plits["samples_per_second"]["p50"]
            assert lal["peak_memory_bytes"] < plits["peak_memory_bytes"]
            assert lal["peak_above_static_bytes"] < 0.5 * plits["peak_above_static_bytes"]
            compared += 1
    assert compared == 4


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert target.startswith("https://") or (ROOT / target).is_file(), target
