"""Write the tables of the pages, and the plots, from the committed results.

python scripts/update_docs.py           rewrite them
python scripts/update_docs.py --check   exit with 1 if a table would change, or a plot is not of its results

A table stands between the marks `<!-- name -->` and `<!-- end -->`. What takes results and has none yet is left empty.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from palkernels.bench.kernels import pages
from palkernels.bench.kernels.peers import OURS as OUR_KERNELS
from palkernels.bench.methods import DEFAULT_METHODS
from palkernels.bench.report import learning, plot, predictions, tables
from palkernels.bench.report.compiled import compiled
from palkernels.bench.report.conditions import command, depth, host, rates, short, title
from palkernels.bench.report.markdown import to_markdown
from palkernels.bench.report.points import EAGER_RATE, MEMORY, RATE, Points
from palkernels.bench.report.roles import BASELINE, BASELINES, LEVERS, MODES, OURS, about, against, label
from palkernels.bench.report.table import Column, Table, change, factor, gib, number
from palkernels.bench.serving.tables import long_sound, long_sound_simulated
from palkernels.bench.serving.tables import page as serving_page
from palkernels.bench.study import curves
from palkernels.bench.study.page import page as study_page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
LENGTH = 1500  # audio tokens where a table has one number of them: Whisper's of 30 s
GPU = "NVIDIA H200"  # where a table has one GPU

Document = dict[str, Any]


def headline(measurement: Document, simulation: Document, kernels: Document) -> str:
    """What LAL saves in training and inference, measured and simulated, and the attention kernel alone."""
    model = simulation["meta"]["model"]
    assert model == measurement["meta"]["model"] == kernels["benchmarks"][0]["params"]["model"]
    assert measurement["meta"]["device_name"] == GPU
    columns = [Column(f"{model}, {LENGTH:,} audio tokens", text=True), Column("on", text=True)]
    table = Table("", columns + [Column(heading, text=True) for heading in ("instead of", "LAL", "gain")])
    predicted_points = Points(simulation["rows"])
    sources = (
        ("measured", Points(measurement["rows"]), RATE, ()),
        ("simulated, eager", predicted_points, EAGER_RATE, (GPU,)),
        ("simulated, captured", predicted_points, RATE, (GPU,)),
    )
    for mode, name in zip(MODES, ("training step", "inference"), strict=True):
        for how, points, speed, gpu in sources:
            figures = []
            for method in (BASELINE, OURS):
                memory, rate = (points.value(key, mode, method, LENGTH, *gpu) for key in (MEMORY, speed))
                figures.append(f"{gib(memory)} GiB, {number(rate)} samples/s")
            less, more = (points.change(key, mode, OURS, BASELINE, LENGTH, *gpu) for key in (MEMORY, speed))
            gain = f"**{change(less)}** memory, **{factor(more)}** throughput"
            table.rows.append([name, f"{short(GPU)}, {how}", f"{label(BASELINE)}: {figures[0]}", figures[1], gain])
    peer = "cat + SDPA (flash)"
    timed = pages.timed(kernels)
    ours, theirs = (timed["forward", model, name] for name in (OUR_KERNELS, peer))
    microseconds = [f"{number(1e6 * row['p50_seconds'])} us" for row in (theirs, ours)]
    on = f"{short(kernels['machine_info']['gpu'])}, measured"
    gain = f"**{theirs['slower_than_ours']:.2f}x** speed"
    table.rows.append(["attention of one layer, forward", on, f"{peer}: {microseconds[0]}", microseconds[1], gain])
    return to_markdown(table)


def compared() -> str:
    """The methods of Figure 1, each with the sentence that explains it."""
    columns = [Column("method", text=True), Column("what it is", text=True)]
    return to_markdown(Table("", columns, [[label(name), about(name)] for name in DEFAULT_METHODS]))


def measured(document: Document) -> str:
    """The run's conditions, a row for each mode and number of audio tokens, a column for each method, and the command
    that made it."""
    meta, points = document["meta"], Points(document["rows"])
    methods = _compared(points)
    table = Table("", [Column("", text=True), Column("audio tokens"), *(Column(label(method)) for method in methods)])
    for mode in MODES:
        for count in points.counts(mode):
            cells = [mode, f"{count:,}"]
            for method in methods:
                row, less = points.row(mode, method, count), points.change(MEMORY, mode, method, BASELINE, count)
                rate = number(points.value(RATE, mode, method, count)) or (row["status"] if row else "")
                cells.append(rate if less is None else f"{rate}, {change(less)}")
            table.rows.append(cells)
    where = meta["gpu"] or f"{meta['device_name']} with {meta['threads']} threads"
    conditions = (
        f"{meta['model']}, {depth(meta)}, {meta['dtype']}, training batch {meta['train_batch']}, inference batch "
        f"{meta['infer_batch']}, {meta['text_tokens']} text tokens, {meta['new_tokens']} new tokens, on "
        f"{where}, {meta['date'][:10]}; medians of "
        f"{meta['repeats']['train']} training steps and {meta['repeats']['infer']} inferences. Samples per second, and "
        "peak memory against PLITS:"
    )
    return f"{conditions}\n\n{to_markdown(table)}\nMade by `{command(meta)}`.\n"


def on_gpus(documents: dict[str, Document], shown: Container[str]) -> str:
    """Figure 1 on further GPUs, with its picture; `shown` stand elsewhere."""
    text = ""
    for name, document in sorted(documents.items()):
        if name not in shown:
            where = document["meta"]["gpu"] or document["meta"]["device_name"]
            text += f"### Measured on {where}\n\n![{title(document['meta'])}](../bench/results/{name}.png)\n\n"
            text += f"{measured(document)}\n"
    return text


def compiled_on_gpus(documents: dict[str, Document], _: Container[str]) -> str:
    """Generation with compiled steps, GPU by GPU."""
    text = ""
    for _, document in sorted(documents.items()):
        table, meta = compiled(document.get("compiled", [])), document["meta"]
        if table is not None:
            where = meta["gpu"] or meta["device_name"]
            text += f"{meta['model']}, {depth(meta)}, on {where}, {meta['date'][:10]}. {table.title}:\n\n"
            text += f"{to_markdown(table)}\n"
    return text


def predicted(measurement: Document, simulation: Document) -> str:
    points = Points(measurement["rows"]), Points(simulation["rows"])
    return to_markdown(predictions.memory(*points, LENGTH, GPU))


def predicted_rates(measurement: Document, simulation: Document) -> str:
    points = Points(measurement["rows"]), Points(simulation["rows"])
    return to_markdown(predictions.throughput(*points, LENGTH, GPU))


def simulated(*documents: Document) -> str:
    """The conditions, and a row for each mode, model and number of audio tokens."""
    meta = documents[0]["meta"]
    models = [(document["meta"]["model"], Points(document["rows"])) for document in documents]
    devices = models[0][1].devices
    table = Table("", [Column("", text=True), Column("model", text=True), Column("audio tokens")])
    table.columns += [Column(label(method), "GiB with") for method in (*BASELINES, OURS)]
    speeds = [*((RATE, gpu) for gpu in devices), (EAGER_RATE, GPU)]
    for group in ("memory", *map(short, devices), f"{short(GPU)} eager"):
        table.columns += [Column(against(base), group) for base in BASELINES]
    for mode in MODES:
        for model, points in models:
            for count in points.counts(mode):
                sizes = [points.value(MEMORY, mode, method, count) for method in (*BASELINES, OURS)]
                less = [points.change(MEMORY, mode, OURS, base, count) for base in BASELINES]
                more = [points.change(key, mode, OURS, base, count, gpu) for key, gpu in speeds for base in BASELINES]
                cells = [*map(gib, sizes), *map(change, less), *map(factor, more)]
                table.rows.append([mode, model, f"{count:,}", *cells])
    conditions = (
        f"All layers, {meta['dtype']}, training batch {meta['train_batch']}, inference batch {meta['infer_batch']}, "
        f"{meta['text_tokens']} text tokens, {meta['new_tokens']} new tokens; {'; '.join(rates(meta))}; {host(meta)}; "
        f"optimizer: {meta['optimizer']}. Peak memory in GiB, LAL's change of it, and LAL's throughput as a multiple, "
        "with captured graphs and in eager mode:"
    )
    return f"{conditions}\n\n{to_markdown(table)}"


def every_method(document: Document) -> str:
    """A row for each method at one number of audio tokens: memory, and throughput on one GPU as multiples."""
    points = Points(document["rows"])
    table = Table("", [Column("", text=True)])
    for group in ("training", "inference"):
        gains = [f"{on}{against(BASELINE)}" for on in ("", f"{short(GPU)} ", f"{short(GPU)} eager ")]
        table.columns += [Column(heading, group) for heading in ("GiB", *gains)]
    for method in _compared(points):
        cells = [label(method)]
        for mode in MODES:
            cells.append(gib(points.value(MEMORY, mode, method, LENGTH)))
            cells.append(change(points.change(MEMORY, mode, method, BASELINE, LENGTH)))
            cells += [factor(points.change(key, mode, method, BASELINE, LENGTH, GPU)) for key in (RATE, EAGER_RATE)]
        table.rows.append(cells)
    return to_markdown(table)


def paper(document: Document) -> str:
    table = tables.paper(Points(document["rows"]), published_alone=True)
    return to_markdown(table) if table else ""


def levers(document: Document) -> str:
    table = tables.levers(Points(row for row in document["rows"] if row["audio_tokens"] == LENGTH))
    return to_markdown(table) if table else ""


def serving(document: Document) -> str:
    table = tables.serving([row for row in document.get("serving", []) if row.get("device") == GPU])
    return f"{table.title}:\n\n{to_markdown(table)}" if table else ""


def short_clips(document: Document) -> str:
    """The run's conditions, and a row for each length of the clips and method."""
    table, meta = tables.short_clips(document.get("short_clips", [])), document["meta"]
    if table is None:
        return ""
    where = meta["gpu"] or f"{meta['device_name']} with {meta['threads']} threads"
    conditions = f"{meta['model']}, {depth(meta)}, {meta['encoder']}, on {where}, {meta['date'][:10]}. {table.title}:"
    return f"{conditions}\n\n{to_markdown(table)}"


def _compared(points: Points) -> list[str]:
    """Return the methods of Figure 1."""
    return [name for name in points.methods("train") if name not in LEVERS]


@dataclass(frozen=True)
class Entry:
    """The place of a table, what writes it, the results it takes, and the result whose picture stands above it."""

    page: str
    mark: str
    write: Callable[..., str]
    results: tuple[str, ...]
    picture: str = ""
    pattern: str = ""  # of the names of all results that it takes, instead


GPUS = "[a-z0-9]+"  # as scripts/gpu_results.py names them
FIGURE1 = f"figure1-{GPUS}"
COMPILED = f"compiled-{GPUS}"
KERNELS = f"({'|'.join(pages.KERNEL_RESULTS)})-{GPUS}"
SIMULATED = ("simulate-llama-3.2-1b", "simulate-llama-3.2-3b", "simulate-qwen2.5-1.5b")
STUDY = "study"
STARTS = ("gentle-start", "gentle-start-all")
ENTRIES = (
    Entry("README.md", "headline", headline, ("figure1-h200", SIMULATED[0], "microbench-h200")),
    Entry("docs/results.md", "compared", compared, ()),
    Entry("docs/results.md", "figure1-h200", measured, ("figure1-h200",)),
    Entry("docs/results.md", "predicted", predicted, ("figure1-h200", SIMULATED[0])),
    Entry("docs/results.md", "predicted-rates", predicted_rates, ("figure1-h200", SIMULATED[0])),
    Entry("docs/results.md", "figure1-gpus", on_gpus, (), pattern=FIGURE1),
    Entry("docs/results.md", "compiled-gpus", compiled_on_gpus, (), pattern=COMPILED),
    Entry("docs/results.md", "figure1-cpu", measured, ("figure1-cpu",)),
    Entry("docs/results.md", "figure1-cpu-llama", measured, ("figure1-cpu-llama-3.2-1b",)),
    Entry("docs/results.md", "short-clips", short_clips, ("figure1-cpu-clips",)),
    Entry("docs/results.md", "study", study_page, (STUDY,)),
    Entry("docs/results.md", "simulated", simulated, SIMULATED, picture=SIMULATED[0]),
    Entry("docs/results.md", "methods", every_method, SIMULATED[:1]),
    Entry("docs/results.md", "paper", paper, SIMULATED[:1]),
    Entry("docs/results.md", "levers", levers, SIMULATED[:1]),
    Entry("docs/results.md", "serving", serving, SIMULATED[:1]),
    Entry("docs/audio_llm.md", "windows", lambda it: to_markdown(learning.windows(it["rows"])), ("whisper-windows",)),
    Entry("docs/audio_llm.md", "gentle-start", lambda *them: to_markdown(learning.starts(them)), STARTS),
    Entry("docs/serving.md", "serving-cpu", serving_page, ("serving-cpu",)),
    Entry("docs/serving.md", "long-sound-cpu", long_sound, ("long-sound-cpu",)),
    Entry("docs/serving.md", "long-sound-vllm", long_sound, ("long-sound-vllm",)),
    Entry("docs/serving.md", "long-sound-simulated", long_sound_simulated, ("long-sound-llama-3.2-1b",)),
    Entry("docs/kernels.md", "microbench-h200", pages.microbench, ("microbench-h200",)),
    Entry("docs/kernels.md", "microbench-h200-again", pages.timed_again, ("microbench-h200", "microbench-h200-again")),
    Entry("docs/kernels.md", "kernels-gpus", pages.on_gpus, (), pattern=KERNELS),
    Entry("docs/kernels.md", "host", pages.host_times, ("host-stand-in",)),
    Entry("bench/LOG.md", "goals-h200", pages.goals, ("microbench-h200",)),
)
SHOWN = {name for entry in ENTRIES for name in entry.results}


def with_picture(name: str) -> bool:
    return name in (*SIMULATED, STUDY) or re.fullmatch(FIGURE1, name) is not None


def picture_of(name: str, document: Document) -> bytes:
    return curves.render(document) if name == STUDY else plot.render(document)


def content(entry: Entry, documents: dict[str, Document]) -> str:
    """Return what stands between an entry's marks."""
    if entry.pattern:
        return entry.write({name: x for name, x in documents.items() if re.fullmatch(entry.pattern, name)}, SHOWN)
    present = [documents[name] for name in entry.results if name in documents]
    if len(present) < len(entry.results):
        return ""
    written = entry.write(*present)
    if not entry.picture:
        return written
    path = os.path.relpath(RESULTS / f"{entry.picture}.png", (ROOT / entry.page).parent)
    return f"![Memory and throughput: {title(documents[entry.picture]['meta'])}]({path})\n\n{written}"


def _description(picture: Path) -> str:
    return str(Image.open(picture).info.get("Description", ""))


def main() -> None:
    check = "--check" in sys.argv[1:]
    documents = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    for entry in ENTRIES:
        path = ROOT / entry.page
        marked = re.compile(rf"(<!-- {entry.mark} -->\n).*?(<!-- end -->)", re.DOTALL)
        old, between = path.read_text(), content(entry, documents)
        new, times = marked.subn(lambda around, between=between: around[1] + between + around[2], old)
        if times != 1:
            sys.exit(f"{entry.page} must have the mark {entry.mark} once, got {times}")
        if not check:
            path.write_text(new)
        elif new != old:
            sys.exit(f"{entry.page} must be as scripts/update_docs.py writes it, got another table {entry.mark}")
    for name in filter(with_picture, documents):
        picture = RESULTS / f"{name}.png"
        if not check:
            picture.write_bytes(picture_of(name, documents[name]))
        elif not picture.exists() or plot.digest(documents[name]) not in _description(picture):
            sys.exit(f"{picture.name} must be as scripts/update_docs.py draws it, got one of other results")


if __name__ == "__main__":
    main()
