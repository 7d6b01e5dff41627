"""`palkernels bench-serving` with vLLM itself."""

import json

import pytest

from palkernels.bench.cli import main


def test_both_are_loaded(directory, tmp_path, monkeypatch):
    """Every answer has its length, and a second question finds the clip's keys and values, by LAL as by PLITS."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    saved = [directory(name) for name in ("plits", "lal")]
    arguments = ["--questions", "2", "--concurrency", "1", "--requests", "4", "--seconds", "3", "--new-tokens", "4"]
    arguments += ["--dtype", "fp32", "--out", tmp_path / "out", "--", "--enforce-eager", "--max-model-len", "1024"]
    with pytest.raises(SystemExit) as ended:
        main(["bench-serving", *(f"--model={path}" for path in saved), *map(str, arguments), "--block-size", "32"])
    assert ended.value.code == 0
    rows = json.loads((tmp_path / "out" / "serving.json").read_text())["rows"]
    assert [row["model"] for row in rows] == [path.name for path in saved]
    for row in rows:
        assert row["requests"] == 4
        assert row["processor_seconds_per_request"] > 0
        # The text before a clip and the clip fill a block of 32; two of four questions find it.
        assert row["cached_share_of_prompts"] == pytest.approx(2 * 32 / (4 * row["prompt_tokens"]))


def test_a_server_that_runs(running, tmp_path):
    arguments = ["--questions", "1,2", "--concurrency", "4", "--requests", "4", "--seconds", "3", "--new-tokens", "4"]
    with pytest.raises(SystemExit) as ended:
        main(["bench-serving", "--serve", running.url, *arguments, "--out", str(tmp_path / "out")])
    assert ended.value.code == 0
    document = json.loads((tmp_path / "out" / "serving.json").read_text())
    assert [(row["model"], row["requests"]) for row in document["rows"]] == [("pal", 4), ("pal", 4)]
    assert document["meta"]["versions"]["vllm"].startswith("0.32")
