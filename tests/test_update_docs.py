"""What scripts/update_docs.py writes from results."""

import copy
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from support import documents

from palkernels.bench.methods import DEFAULT_METHODS, METHODS

ROOT = Path(__file__).parents[1]
specification = importlib.util.spec_from_file_location("update_docs", ROOT / "scripts" / "update_docs.py")
update_docs = importlib.util.module_from_spec(specification)
specification.loader.exec_module(update_docs)


@pytest.mark.parametrize(("layers", "said"), [(2, "2 of 16 layers"), (16, "all 16 layers")])
def test_a_measured_table_says_how_deep_the_model_was(layers, said):
    document = documents.measured()
    document["meta"]["layers"] = layers
    sentence, _, table = update_docs.measured(document).partition("\n\n")
    assert sentence.startswith(f"llama-3.2-1b, {said}, bfloat16, training batch 2, ")
    assert "| train | 512 | 2.00 | 6.00, -25.0 % |" in table.splitlines()
    assert "| train | 1,500 | out of memory | 5.00 |" in table.splitlines()
    assert table.splitlines()[-1].startswith("Made by `palkernels figure1 --audio 'my clip.wav' --model llama-3.2-1b")


def median(row):
    return row["samples_per_second"]["p50"]


def eager(row):
    return row["eager_samples_per_second"]


def result(name):
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())


def test_the_headline_is_seven_rows_of_the_results():
    names = ("figure1-h200", "simulate-llama-3.2-1b", "microbench-h200")
    measured, simulated, kernels = map(result, names)
    heading, _, *rows = update_docs.headline(measured, simulated, kernels).splitlines()
    assert heading.startswith("| llama-3.2-1b, 1,500 audio tokens | on |")
    assert len(rows) == 7
    sources = (
        (measured, "measured", median), (simulated, "simulated, eager", eager),
        (simulated, "simulated, captured", median),
    )  # fmt: skip
    where = [(mode, source) for mode in ("train", "infer") for source in sources]
    for line, (mode, (document, how, rate)) in zip(rows, where, strict=False):
        plits, lal = (
            row
            for method in ("plits", "lal")
            for row in document["rows"]
            if (row["mode"], row["method"], row["audio_tokens"]) == (mode, method, 1500)
            and row.get("device", "NVIDIA H200") == "NVIDIA H200"
        )
        less = 1 - lal["peak_memory_bytes"] / plits["peak_memory_bytes"]
        more = rate(lal) / rate(plits)
        assert f"| **-{100 * less:.1f} %** memory, **{more:.2f}x** throughput |" in line
        assert f"| PLITS: {plits['peak_memory_bytes'] / 2**30:.2f} GiB" in line
        assert f"| H200, {how} |" in line
    assert "| H200, measured | cat + SDPA (flash): " in rows[6]


def test_the_simulated_memory_is_near_the_allocators():
    """Within 1 %, as bench/LOG.md says; the optimizer's moments, 2 x 2 bytes a parameter, are added."""
    lines = update_docs.predicted(result("figure1-h200"), result("simulate-llama-3.2-1b")).splitlines()[2:]
    assert len(lines) == len(DEFAULT_METHODS)
    off = [float(cell[:-2]) for line in lines for cell in line.removesuffix(" |").split(" | ") if cell.endswith(" %")]
    assert len(off) == 2 * len(lines)
    assert all(0 <= error <= 1 for error in off)
    plits = next(line for line in lines if line.startswith("| PLITS |"))
    assert plits.startswith("| PLITS | 46.99 | 47.09 | +0.2 % | 4.18 | 4.21 |")


def test_predictions_of_eager_mode_hold():
    """Within a third of what an H200 did with 1,500 audio tokens, and LAL's loss in generation is predicted."""
    lines = update_docs.predicted_rates(result("figure1-h200"), result("simulate-llama-3.2-1b")).splitlines()[2:]
    assert len(lines) == len(DEFAULT_METHODS)
    cells = {line.split(" | ")[0].removeprefix("| "): line.removesuffix(" |").split(" | ")[1:] for line in lines}
    shares = [float(share) for row in cells.values() for share in (row[5], row[11])]
    assert all(2 / 3 <= share <= 1.1 for share in shares)
    lal, plits = (list(map(float, cells[name][8:11])) for name in ("LAL", "PLITS"))
    assert lal[0] > 3 * plits[0]  # captured
    assert lal[1] < plits[1]  # eager, and so it was measured
    assert lal[2] < plits[2]


def test_pictures_are_found_from_the_page():
    entry = next(entry for entry in update_docs.ENTRIES if entry.picture)
    folder, picture = ROOT / "bench" / "results", f"{entry.picture}.png"
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name in entry.results}
    for page, path in (("README.md", f"bench/results/{picture}"), ("docs/results.md", f"../bench/results/{picture}")):
        first = update_docs.content(replace(entry, page=page), results).splitlines()[0]
        assert first.startswith("![Memory and throughput: llama-3.2-1b, all 16 layers")
        assert first.endswith(f"]({path})")


def test_what_has_no_results_is_empty():
    of_results = [entry for entry in update_docs.ENTRIES if entry.mark != "compared"]  # which takes none
    assert of_results
    for entry in of_results:
        assert update_docs.content(entry, {}) == ""


def test_every_method_of_figure_1_is_explained():
    (entry,) = (entry for entry in update_docs.ENTRIES if entry.mark == "compared")
    lines = update_docs.content(entry, {}).splitlines()[2:]
    assert lines == [f"| {METHODS[name].label} | {METHODS[name].about} |" for name in DEFAULT_METHODS]


def test_a_short_window_of_whisper_costs_a_tenth_and_says_what_it_changes():
    document = result("whisper-windows")
    seconds = {row["window_seconds"]: row["encoder_seconds"] for row in document["rows"]}
    assert seconds[30] / seconds[3] > 9
    of_clips = {}
    for row in document["rows"]:  # in the order of the windows
        of_clips.setdefault(row["clips"], []).append(row["mean_cosine"])
    assert all(cosines == sorted(cosines) and cosines[-1] > 0.9999 for cosines in of_clips.values())
    (entry,) = (entry for entry in update_docs.ENTRIES if entry.mark == "windows")
    lines = update_docs.content(entry, {"whisper-windows": document}).splitlines()
    assert lines[0] == f"| window, s | encoder, ms | {' | '.join(of_clips)} |"
    assert len(lines) == 2 + len(seconds)
    assert lines[2].endswith("| cut |")
    assert f" {of_clips['words'][0]:.3f} (" in lines[2]


def test_where_connectors_begin_is_told_by_the_least_and_the_most_of_all_seeds():
    (entry,) = (entry for entry in update_docs.ENTRIES if entry.mark == "gentle-start")
    documents = {name: result(name) for name in entry.results}
    lines = update_docs.content(entry, documents).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["sink", "random"] * 2
    losses = [row["first_loss"] for row in documents["gentle-start"]["rows"] if row["initialization"] == "random"]
    assert f"| random | {min(losses):.1f} to {max(losses):.1f} | " in lines[3]


def written(mark, documents):
    (entry,) = (entry for entry in update_docs.ENTRIES if entry.mark == mark)
    return update_docs.content(entry, documents)


def of(gpu, name, **versions):
    """A result as if it were of another GPU."""
    document = copy.deepcopy(result(name))
    document["machine_info"]["gpu"] = gpu
    document["machine_info"]["versions"] |= versions
    return document


def test_kernels_on_another_gpu_have_a_section():
    documents = {
        "microbench-h100": of("NVIDIA H100 80GB HBM3", "microbench-h200-again", ptxas="12.8"),
        "ptxas-h100": of("NVIDIA H100 80GB HBM3", "microbench-h200-again", ptxas="13.5"),
        "flash-attn-4-h100": of("NVIDIA H100 80GB HBM3", "microbench-h200-again"),
        "host-h100": result("host-stand-in"),
    }
    text = written("kernels-gpus", documents)
    assert text.startswith("### More on the GPU H100\n\nNVIDIA H100 80GB HBM3, CUDA 13.0, torch ")
    assert "\nBeside flash-attn 4, in a run of its own:\n\n|  |  | us | limit | cat + SDPA (flash) |" in text
    assert "|  |  | us, ptxas 12.8 | us, ptxas 13.5 |" in text
    assert "\nThe host's time of a call:\n\n|" in text


def test_audio_in_eight_bits_has_a_table():
    text = written("kernels-gpus", {"eight-bits-h100": of("NVIDIA H100 80GB HBM3", "microbench-h200-again")})
    assert text.startswith("### More on the GPU H100\n\nAudio in 16 bits and in eight, in a run of its own:\n\n|  |")


def test_a_sweep_shows_the_shipped_tile_and_the_fastest():
    tiles = [
        {"block_m": m, "block_n": 64, "num_warps": 8, "num_stages": 3, "max_registers": 128} for m in (128, 64, 32)
    ]
    rows = [
        {"model": "llama-3.2-1b", "kernel": "forward", "tile": tile, "microseconds": time}
        for tile, time in zip(tiles, (39.3, 37.0, None), strict=True)
    ]
    text = written("kernels-gpus", {"sweep-forward-h100": {"rows": rows}})
    assert text.splitlines()[-1] == (
        "| llama-3.2-1b | forward | 128 x 64, 8 warps, 3 stages, 128 registers | 39.3 | "
        "64 x 64, 8 warps, 3 stages, 128 registers | 37.0 | 2 |"
    )


def test_what_stands_elsewhere_is_not_repeated():
    documents = {"microbench-h200": result("microbench-h200"), "ptxas-h200": of("NVIDIA H200", "microbench-h200")}
    text = written("kernels-gpus", documents)
    assert text.startswith("### More on the GPU H200\n\nTriton's own ptxas and a newer one:\n\n")
    assert written("kernels-gpus", {"microbench-h200": result("microbench-h200")}) == ""
    assert written("figure1-gpus", {"figure1-h200": result("figure1-h200")}) == ""


def test_figure_1_on_another_gpu_has_a_section_and_a_picture():
    document = result("figure1-h200")
    document["meta"] |= {"gpu": "NVIDIA H100 80GB HBM3"}
    text = written("figure1-gpus", {"figure1-h100": document, "figure1-h200": result("figure1-h200")})
    assert text.startswith("### Measured on NVIDIA H100 80GB HBM3\n\n![llama-3.2-1b, all 16 layers")
    assert "(../bench/results/figure1-h100.png)" in text
    assert "| train | 1,500 |" in text
    assert update_docs.with_picture("figure1-h100")
    assert not update_docs.with_picture("figure1-cpu-clips")
