"""The code of README.md and KERNELS.md runs, and their figures are those of the committed results."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from palkernels import reference

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "KERNELS.md")
CODE = [
    (page, code) for page in PAGES for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
]


@pytest.mark.parametrize(("page", "code"), CODE, ids=range(len(CODE)))
def test_code_runs(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a page may save something
    exec(compile(code, page, "exec"), {})


def test_there_is_code():
    everything = "".join(code for _, code in CODE)
    for call in ("attach(", "lal_attention(", "lal_attention_varlen(", "audio_kv(", "tiles.use("):
        assert call in everything


def test_the_mask_is_as_drawn():
    drawn = re.findall(r"^    p=\d   ([#. ]+)$", (ROOT / "KERNELS.md").read_text(), re.MULTILINE)
    visible_from = torch.tensor([[0, 0, 3, 3, 3]])
    mask = reference.lal_mask(
        1, 6, 6, 5, audio_lengths=torch.tensor([4]), audio_visible_from=visible_from, text_start=torch.tensor([1]),
        text_end=None, window=3, device=torch.device("cpu"),
    )  # fmt: skip
    assert [[mark == "#" for mark in line.split()] for line in drawn] == mask[0].tolist()


def test_figures_come_from_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "update_docs.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_results_show_what_the_readme_says():
    """From 512 audio tokens on LAL is ahead of every form of PLITS in throughput, of stock PLITS in memory too, by a
    wide margin above the static part; and no slower than LAL without this library's kernels, as far as samples tell."""
    rows = json.loads((ROOT / "bench" / "results" / "figure1-cpu.json").read_text())["rows"]
    found = {(row["method"], row["mode"], row["audio_tokens"]): row for row in rows}
    compared = 0
    for (method, mode, tokens), lal in found.items():
        if method != "lal" or tokens < 512:
            continue
        plits, eager = found["plits", mode, tokens], found["lal-eager", mode, tokens]
        for form in ("plits", "plits-tuned", "plits-pooled"):
            assert lal["samples_per_second"]["p50"] > found[form, mode, tokens]["samples_per_second"]["p50"], form
        assert lal["peak_memory_bytes"] < plits["peak_memory_bytes"]
        assert lal["peak_above_static_bytes"] < 0.5 * plits["peak_above_static_bytes"]
        assert max(lal["samples_per_second"]["samples"]) > min(eager["samples_per_second"]["samples"])
        compared += 1
    assert compared == 4


def test_links_lead_somewhere():
    for page in (*PAGES, "bench/LOG.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
            assert target.startswith("https://") or ((ROOT / page).parent / target).is_file(), target
