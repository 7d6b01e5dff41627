"""Write the tables of README.md, KERNELS.md and bench/LOG.md, and the plots, from the committed results.

python scripts/update_readme.py           rewrite them and the plots
python scripts/update_readme.py --check   exit with 1 if a table would change, or a plot is not of its results

What has no results yet is left empty.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from palkernels.bench.kernels.peers import OURS
from palkernels.bench.methods import LEVERS, MODES
from palkernels.bench.report import plot, tables
from palkernels.bench.report.conditions import label, rates, short
from palkernels.bench.report.points import MEMORY, RATE, Points

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
SIMULATED = ("simulate-llama-3.2-1b", "simulate-llama-3.2-3b", "simulate-qwen2.5-1.5b")
LENGTH = 1500  # audio tokens where a table has one number of them: Whisper's of 30 s
GPU = "NVIDIA H200"  # where it has one GPU


def markdown(table: tables.Table | None) -> str:
    """Headings of groups become part of their columns'."""
    if table is None:
        return ""
    heads = [f"{column.group} {column.heading}".strip() for column in table.columns]
    rules = ["---" if column.text else "---:" for column in table.columns]
    rows = [row + [""] * (len(heads) - len(row)) for row in table.rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, rules, *rows))


def measured_table(document: dict) -> str:
    """The run's conditions, and a row per mode and number of audio tokens, a column per method."""
    meta, points = document["meta"], Points(document["rows"])
    methods = [name for name in points.methods("train") if name not in LEVERS]
    table = tables.Table("", [tables.Column("", text=True), tables.Column("audio tokens")])
    table.columns += [tables.Column(label(method)) for method in methods]
    for mode in MODES:
        for count in points.counts(mode):
            cells = [mode, f"{count:,}"]
            for method in methods:
                row, less = points.row(mode, method, count), points.change(MEMORY, mode, method, "plits", count)
                rate = tables.number(points.value(RATE, mode, method, count)) or (row["status"] if row else "")
                cells.append(rate if less is None else f"{rate}, {tables.change(less)}")
            table.rows.append(cells)
    said = (
        f"{meta['model']} with {meta['layers']} of its {meta['full_layers']} layers, {meta['dtype']}, training batch "
        f"{meta['train_batch']}, inference batch {meta['infer_batch']}, {meta['text_tokens']} text tokens, "
        f"{meta['new_tokens']} new tokens, on {meta['device_name']} with {meta['threads']} threads, "
        f"{meta['date'][:10]}; medians of {meta['repeats']['train']} training steps and {meta['repeats']['infer']} "
        "inferences. Samples per second, and peak memory against PLITS:"
    )
    return f"{said}\n\n{markdown(table)}"


def simulated_table(*documents: dict) -> str:
    """The first one's picture, the conditions, and a row per mode, model and number of audio tokens."""
    meta = documents[0]["meta"]
    found = [(x["meta"]["model"], Points(x["rows"])) for x in documents]
    devices = found[0][1].devices
    columns = [tables.Column("", text=True), tables.Column("model", text=True), tables.Column("audio tokens")]
    table = tables.Table("", columns + [tables.Column(f"GiB with {label(x)}") for x in ("plits", "plits-tuned", "lal")])
    table.columns += [tables.Column(f"memory {against}") for against in tables.AGAINST.values()]
    table.columns += [tables.Column(f"{short(x)} {against}") for x in devices for against in tables.AGAINST.values()]
    for mode in MODES:
        for model, points in found:
            for count in points.counts(mode):
                sizes = [points.value(MEMORY, mode, method, count) for method in ("plits", "plits-tuned", "lal")]
                less = [points.change(MEMORY, mode, "lal", base, count) for base in tables.AGAINST]
                more = [points.change(RATE, mode, "lal", base, count, x) for x in devices for base in tables.AGAINST]
                cells = [*map(tables.gib, sizes), *map(tables.change, less), *map(tables.factor, more)]
                table.rows.append([mode, model, f"{count:,}", *cells])
    said = (
        f"All layers, {meta['dtype']}, training batch {meta['train_batch']}, inference batch {meta['infer_batch']}, "
        f"{meta['text_tokens']} text tokens, {meta['new_tokens']} new tokens; {'; '.join(rates(meta))}; "
        f"optimizer: {meta['optimizer']}. Peak memory in GiB, LAL's change of it, and LAL's throughput as a multiple:"
    )
    picture = f"![Simulated memory and throughput, {meta['model']}](bench/results/{SIMULATED[0]}.png)"
    return f"{picture}\n\n{said}\n\n{markdown(table)}"


def methods_table(document: dict) -> str:
    """A row per method, at one number of audio tokens: memory, and throughput on one GPU as a multiple."""
    points = Points(document["rows"])
    methods = [name for name in points.methods("train") if name not in LEVERS]
    table = tables.Table("", [tables.Column("", text=True)])
    for mode in ("training", "inference"):
        table.columns += [tables.Column(f"{mode} {what}") for what in ("GiB", "vs PLITS", f"{short(GPU)} vs PLITS")]
    for method in methods:
        cells = [label(method)]
        for mode in MODES:
            at = (mode, method, "plits", LENGTH)
            cells += [tables.gib(points.value(MEMORY, mode, method, LENGTH)), tables.change(points.change(MEMORY, *at))]
            cells.append(tables.factor(points.change(RATE, *at, GPU)))
        table.rows.append(cells)
    return markdown(table)


def paper_table(document: dict) -> str:
    return markdown(tables.paper(Points(document["rows"]), published_alone=True))


def levers_table(document: dict) -> str:
    return markdown(tables.levers(Points(row for row in document["rows"] if row["audio_tokens"] == LENGTH)))


def serving_table(document: dict) -> str:
    found = tables.serving([row for row in document.get("serving", []) if row.get("device") == GPU])
    return f"{found.title}:\n\n{markdown(found)}" if found else ""


def microbench_table(document: dict) -> str:
    """The run's conditions, and a row per model and operation: our time, and by how much each peer is slower."""
    machine, benchmarks = document["machine_info"], document["benchmarks"]
    ceilings = machine["ceilings"]
    measured = [row for row in benchmarks if "p50_seconds" in row["extra_info"]]
    peers = list(dict.fromkeys(row["name"] for row in measured if row["name"] != OURS))
    first = measured[0]["params"]
    lines = [
        f"{machine['gpu']}, CUDA {machine['cuda']}, torch {machine['versions']['torch']}, triton "
        f"{machine['versions']['triton']}, {first['dtype']}, {first['audio_tokens']} audio and {first['text_tokens']} "
        f"text tokens, {document['datetime'][:10]}; batch 8, of decoding 12. Ceilings measured in the same run: "
        f"{ceilings['flops_per_second'] / 1e12:.0f} TFLOP/s, {ceilings['bytes_per_second'] / 1e12:.2f} TB/s. Our "
        "median time, its share of the limit, and how many times longer each peer takes:",
        "",
        "| | | us | limit | " + " | ".join(peers) + " |",
        "|---|---|---:|---:|" + "---:|" * len(peers),
    ]
    times = {(row["params"]["model"], row["params"]["op"], row["name"]): row["extra_info"] for row in measured}
    for (model, operation, name), ours in times.items():
        if name != OURS:
            continue
        slower = [times.get((model, operation, peer), {}).get("slower_than_ours") for peer in peers]
        cells = ["" if ratio is None else f"{ratio:.2f}x" for ratio in slower]
        lines.append(
            f"| {model} | {operation} | {ours['p50_seconds'] * 1e6:.1f} | {ours['share_of_limit']:.0%} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


# What the kernels are meant to reach, by operation: shares of the limit by head dim, and how many times longer peers
# take. Decoding has its share at 75 MB and more, which only the 3B shape moves.
GOALS: dict[str, tuple[dict[int, float], dict[str, float]]] = {
    "forward": (
        {64: 0.50, 128: 0.55},
        {
            "cat + SDPA (flash)": 1.6,
            "cat + SDPA (cuDNN)": 1.4,
            "cat + FlexAttention": 1.7,
            "2 x SDPA + merge": 1.5,
        },
    ),
    "backward": (
        {64: 0.38, 128: 0.38},
        {
            "cat + SDPA (flash)": 1.7,
            "cat + SDPA (cuDNN)": 1.1,
            "cat + FlexAttention": 1.5,
            "2 x SDPA + merge": 1.5,
        },
    ),
    "decode": ({64: 0.75, 128: 0.75}, {"cat + SDPA (flash)": 2.0, "cat + FlexAttention": 1.5}),
}


def goals_table(document: dict) -> str:
    """Where each preset stands; in bold what is short of its goal."""
    measured = {
        (row["params"]["op"], row["params"]["model"], row["name"]): row
        for row in document["benchmarks"]
        if "p50_seconds" in row["extra_info"]
    }
    models = list(dict.fromkeys(model for _, model, _ in measured))
    lines = ["| | goal | " + " | ".join(models) + " |", "|---|---:|" + "---:|" * len(models)]

    def line(what: str, goals: list[float], values: list[float], unit: str) -> str:
        cells = [f"{x:.2f}{unit}" if x >= goal else f"**{x:.2f}{unit}**" for x, goal in zip(values, goals, strict=True)]
        wanted = " / ".join(f"{goal:g}{unit}" for goal in dict.fromkeys(goals))
        return f"| {what} | {wanted} | " + " | ".join(cells) + " |"

    for operation, (shares, peers) in GOALS.items():
        ours = [measured[operation, model, OURS] for model in models]
        goals = [shares[row["params"]["head_dim"]] for row in ours]
        lines.append(
            line(f"{operation}, share of the limit", goals, [x["extra_info"]["share_of_limit"] for x in ours], "")
        )
        for peer, goal in peers.items():
            ratios = [measured[operation, model, peer]["extra_info"]["slower_than_ours"] for model in models]
            lines.append(line(f"{operation}, {peer}", [goal] * len(models), ratios, "x"))
    return "\n".join(lines) + "\n"


# Page, mark, what writes it, and the results that it takes.
TABLES: tuple[tuple[str, str, Callable[..., str], tuple[str, ...]], ...] = (
    ("README.md", "figure1-cpu", measured_table, ("figure1-cpu",)),
    ("README.md", "simulated", simulated_table, SIMULATED),
    ("README.md", "methods", methods_table, SIMULATED[:1]),
    ("README.md", "paper", paper_table, SIMULATED[:1]),
    ("README.md", "levers", levers_table, SIMULATED[:1]),
    ("README.md", "serving", serving_table, SIMULATED[:1]),
    ("KERNELS.md", "microbench-h200", microbench_table, ("microbench-h200",)),
    ("bench/LOG.md", "goals-h200", goals_table, ("microbench-h200",)),
)
PICTURES = ("figure1-cpu", *SIMULATED)


def main() -> None:
    check = "--check" in sys.argv[1:]
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    for name, mark, write, wanted in TABLES:
        path, documents = ROOT / name, [found[x] for x in wanted if x in found]
        content = write(*documents) if documents else ""
        marked = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", re.DOTALL)
        old = path.read_text()
        new, times = marked.subn(lambda around, content=content: around[1] + content + around[2], old)
        if times != 1:
            sys.exit(f"{name} must have the mark {mark} once, got {times}")
        if not check:
            path.write_text(new)
        elif new != old:
            sys.exit(f"{name} must be as scripts/update_readme.py writes it, got another table {mark}")
    for name in PICTURES:
        picture = RESULTS / f"{name}.png"
        if name not in found:
            continue
        if not check:
            picture.write_bytes(plot.render(found[name]))
        elif not picture.exists() or plot.digest(found[name]) not in Image.open(picture).info.get("Description", ""):
            sys.exit(f"{picture.name} must be as scripts/update_readme.py draws it, got one of other results")


if __name__ == "__main__":
    main()
