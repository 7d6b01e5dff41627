"""The pages say what is so: their code runs, links lead somewhere, and figures are those of the committed results."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import typer

from palkernels import reference
from palkernels.bench import cli
from palkernels.model.training.located import compose

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "docs" / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "bench").glob("*.md")]
README_LINES = 130
TOPS = ("palkernels", "model", "bench", "tests", "examples", "docs", "scripts")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def code_of(page):
    """A page's Python in pieces that stand alone: a block that begins with ``import torch`` begins a piece, any other
    goes on with the one before."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    begins = [i for i, block in enumerate(blocks) if block.startswith("import torch\n")]
    assert begins[:1] == ([0] if blocks else []), f"the first block of {name_of(page)} must begin with import torch"
    return ["".join(blocks[a:b]) for a, b in pairwise([*begins, len(blocks)])]


CODE = [(name_of(page), code) for page in PAGES for code in code_of(page)]


@pytest.mark.parametrize(("page", "code"), CODE, ids=[f"{page}-{i}" for i, (page, _) in enumerate(CODE)])
def test_code_runs(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a page may save something
    exec(compile(code, page, "exec"), {})


def test_yaml_can_be_read(tmp_path):
    """What a recipe or --data says on a page: a text with a question mark, say, is quoted in braces."""
    texts = [
        x for page in PAGES for x in re.findall(r"```yaml\n(.*?)```|--data '(\{.*?\})'", page.read_text(), re.DOTALL)
    ]
    assert len(texts) > 3
    for block, word in texts:
        assert compose(block or word, "page", tmp_path).plain()


def test_there_is_code():
    everything = "".join(code for _, code in CODE)
    for call in (
        "attach(", "lal_attention(", "lal_attention_varlen(", "audio_kv(", "tiles.use(", "Trainer(", "from_checkpoint(",
        "attach_flamingo(", "freeze_ffn(", "handle.save(", "unsupported_reasons(",
    ):  # fmt: skip
        assert call in everything, call
    assert any(page == "README.md" and "attach(" in code for page, code in CODE)


def test_code_is_made_of_public_parts():
    """What a page shows, a user can import; tiles are the one thing inside that a kernel engineer may turn."""
    modules = {name for _, code in CODE for name in re.findall(r"^(?:from|import) (palkernels\S*)", code, re.MULTILINE)}
    assert modules <= {"palkernels", "palkernels.model", "palkernels.model.data", "palkernels.kernels"}


def test_the_mask_is_as_drawn():
    page = (ROOT / "docs" / "kernels.md").read_text()
    drawn = re.findall(r"^    p=\d   ([#. ]+)$", page, re.MULTILINE)
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


def test_results_of_two_wide_layers_show_what_the_pages_say():
    """From 512 audio tokens on LAL is ahead of every form of PLITS in throughput, of stock PLITS in memory too, by a
    wide margin above the static part; and no slower than LAL without this library's kernels, as far as samples tell."""
    compared = 0
    for (_, mode, tokens), lal, others in lal_beside_others("figure1-cpu-llama-3.2-1b"):
        for form in ("plits", "plits-tuned", "plits-pooled"):
            assert rate(lal) > rate(others[form]), (form, mode, tokens)
        assert lal["peak_memory_bytes"] < others["plits"]["peak_memory_bytes"]
        assert lal["peak_above_static_bytes"] < 0.5 * others["plits"]["peak_above_static_bytes"]
        assert max(lal["samples_per_second"]["samples"]) > min(others["lal-eager"]["samples_per_second"]["samples"])
        compared += 1
    assert compared == 4


def test_results_of_a_whole_small_model_show_what_the_pages_say():
    """The same of all layers of a narrow model, with two limits: above the static part inference consists of keys and
    values, which LAL has as well; and PLITS with a quarter of the tokens is as fast in inference at 512."""
    compared = 0
    for (_, mode, tokens), lal, others in lal_beside_others("figure1-cpu"):
        for form in ("plits", "plits-tuned"):
            assert rate(lal) > 1.5 * rate(others[form]), (form, mode, tokens)
        pooled_is_as_fast = (mode, tokens) == ("infer", 512)
        assert rate(lal) > (0.9 if pooled_is_as_fast else 1) * rate(others["plits-pooled"]), (mode, tokens)
        assert lal["peak_memory_bytes"] < others["plits"]["peak_memory_bytes"]
        share = 0.25 if mode == "train" else 0.75
        assert lal["peak_above_static_bytes"] < share * others["plits"]["peak_above_static_bytes"], (mode, tokens)
        assert max(lal["samples_per_second"]["samples"]) > min(others["lal-eager"]["samples_per_second"]["samples"])
        compared += 1
    assert compared == 4


def lal_beside_others(name):
    """LAL's points of a result from 512 audio tokens on, each with its row and the rows of all methods there."""
    rows = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())["rows"]
    by_point = {(row["method"], row["mode"], row["audio_tokens"]): row for row in rows}
    for (method, mode, tokens), lal in by_point.items():
        if method == "lal" and tokens >= 512:
            others = {key[0]: row for key, row in by_point.items() if key[1:] == (mode, tokens)}
            yield (method, mode, tokens), lal, others


def rate(row):
    return row["samples_per_second"]["p50"]


def anchors_of(page):
    """The anchors that GitHub gives a page's headings."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors_of(linked), target


@pytest.mark.parametrize("page", [page for page in LINKED if page.name != "CHANGELOG.md"], ids=name_of)
def test_files_that_are_named_are_there(page):
    """A name that moved must move here too: folders and files with their path, Python files in drawings without."""
    text = page.read_text()
    for path in re.findall(rf"`((?:{'|'.join(TOPS)})/[\w/.-]*)`", text):
        assert (ROOT / path).exists(), path
    files = {f"/{path.relative_to(ROOT)}" for top in TOPS for path in (ROOT / top).rglob("*.py")}
    for name in re.findall(r"\b[\w/]+\.py\b", text):
        assert any(path.endswith(f"/{name}") for path in files), name


def test_every_room_has_its_line():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for path in (path.parent for top in ("palkernels", "model", "bench") for path in (ROOT / top).rglob("__init__.py")):
        assert f"| `{path.relative_to(ROOT)}/` |" in page, path


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_commands_are_as_named(page):
    """Commands that a page tells one to type, with their options, and targets of make."""
    commands = typer.main.get_command(cli.app).commands
    text = page.read_text()
    for name, arguments in re.findall(r"^    (?:ncu .* )?palkernels ([\w-]+)(.*)$", text, re.MULTILINE):
        arguments = arguments.partition(" -- ")[0]  # behind it they are another program's
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"(?<= )--[a-z-]+", arguments.partition("#")[0])) <= known, name
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([\w-]+)", text, re.MULTILINE)) <= targets


def test_the_index_has_every_page_and_example():
    linked = {target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", INDEX.read_text())}
    assert {page.name for page in DOCS if page != INDEX} <= linked
    assert {f"../examples/{path.name}" for path in (ROOT / "examples").glob("*.py")} <= linked


def test_the_readme_is_one_screen():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= README_LINES
    assert len(re.findall(r"^!\[", text, re.MULTILINE)) == 1
    for command in ("make figure1", "make test"):
        assert command in text


def test_lal_is_ahead_on_clips_of_every_length():
    """In the committed run: CPU seconds of a training sample, and what README says of them."""
    rows = json.loads((ROOT / "bench" / "results" / "figure1-cpu-clips.json").read_text())["short_clips"]
    spent = {(row["seconds"], row["method"]): row["processor_seconds_per_sample"] for row in rows}
    saved = {seconds: 1 - spent[seconds, "lal"] / spent[seconds, "plits"] for seconds in (0.8, 3.0, 30.0)}
    assert min(saved.values()) > 0
    readme = " ".join((ROOT / "README.md").read_text().split())
    said = f"takes {saved[0.8]:.0%} less than with PLITS for a clip of 0.8 s, {saved[30.0]:.0%} less for one of 30 s"
    assert said.replace("%", " %") in readme
