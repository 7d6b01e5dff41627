"""What is timed on the kernels, as tables of the pages. Written by scripts/update_docs.py."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from palkernels.bench.kernels.peers import OURS, PEERS
from palkernels.bench.report.markdown import to_markdown
from palkernels.bench.report.table import Column, Table

__all__ = ["KERNEL_RESULTS", "goals", "host_times", "microbench", "on_gpus", "timed", "timed_again"]

# What scripts/gpu_results.py makes results of, and what of that is about the kernels.
KERNEL_RESULTS = ("microbench", *(peer.key for peer in PEERS if peer.module is not None), "ptxas", "host")
KERNEL_RESULTS += ("sweep-forward", "sweep-backward", "sweep-decode", "eight-bits")

Document = dict[str, Any]
Timed = dict[tuple[str, str, str], dict[str, Any]]  # by operation, model and implementation: the `extra_info`


def timed(document: Document) -> Timed:
    """Return a microbenchmark's figures by operation, model and implementation, as far as it ran."""
    return {
        (row["params"]["op"], row["params"]["model"], row["name"]): row["extra_info"]
        for row in document["benchmarks"]
        if "p50_seconds" in row["extra_info"]
    }


def microbench(document: Document) -> str:
    """The run's conditions, and a row for each model and operation: our time, and how much longer each peer takes."""
    machine, sizes = document["machine_info"], document["benchmarks"][0]["params"]
    ceilings, versions = machine["ceilings"], machine["versions"]
    conditions = (
        f"{machine['gpu']}, CUDA {machine['cuda']}, torch {versions['torch']}, triton {versions['triton']}, "
        f"{sizes['dtype']}, {sizes['audio_tokens']} audio and {sizes['text_tokens']} text tokens, "
        f"{document['datetime'][:10]}; batch 8, of decoding 12. Ceilings measured in the same run: "
        f"{ceilings['flops_per_second'] / 1e12:.0f} TFLOP/s, {ceilings['bytes_per_second'] / 1e12:.2f} TB/s. Our "
        "median time, its share of the limit, and how many times longer each peer takes:"
    )
    return f"{conditions}\n\n{_beside(document)}"


def _beside(document: Document) -> str:
    """Return a row for each model and operation: our time, its share of the limit, and each peer's as a multiple."""
    figures = timed(document)
    peers = list(dict.fromkeys(name for *_, name in figures if name != OURS))
    table = Table("", [Column("", text=True), Column("", text=True), *map(Column, ("us", "limit", *peers))])
    for (operation, model, name), ours in figures.items():
        if name == OURS:
            slower = [figures.get((operation, model, peer), {}).get("slower_than_ours") for peer in peers]
            multiples = ["" if multiple is None else f"{multiple:.2f}x" for multiple in slower]
            cells = [f"{1e6 * ours['p50_seconds']:.1f}", f"{ours['share_of_limit']:.0%}"]
            table.rows.append([model, operation, *cells, *multiples])
    return to_markdown(table)


def _fastest(rows: list[dict[str, Any]]) -> str:
    """A row for each kernel and model of a sweep, whose first tile is the shipped one."""
    columns = [Column("", text=True), Column("", text=True)]
    columns += [Column(heading, group) for group in ("shipped", "fastest") for heading in ("tile", "us")]
    table = Table("", [*columns, Column("tiles timed")])
    sweeps: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        sweeps.setdefault((row["model"], row["kernel"]), []).append(row)
    for (model, kernel), tried in sweeps.items():
        timed_ones = [row for row in tried if row["microseconds"] is not None]
        if timed_ones:
            both = (tried[0], min(timed_ones, key=lambda row: float(row["microseconds"])))
            cells = [text for row in both for text in (_tile(row["tile"]), _microseconds(row))]
            table.rows.append([model, kernel, *cells, str(len(timed_ones))])
    return to_markdown(table)


def _tile(tile: dict[str, Any]) -> str:
    limit = "" if tile["max_registers"] is None else f", {tile['max_registers']} registers"
    split = ", which split the keys" if tile.get("splits_keys") else ""
    warps = f"{tile['num_warps']} warps{split}"
    return f"{tile['block_m']} x {tile['block_n']}, {warps}, {tile['num_stages']} stages{limit}"


def _microseconds(row: dict[str, Any]) -> str:
    return "" if row["microseconds"] is None else f"{row['microseconds']:.1f}"


def timed_again(before: Document, now: Document) -> str:
    """The figures of two runs side by side."""
    return to_markdown(_timed_twice(timed(before), timed(now), before["datetime"][:10]))


def _timed_twice(before: Timed, now: Timed, date: str, peer: str = "cat + SDPA (flash)") -> Table:
    """Return a row for each model and operation that was timed twice: our time and a peer's multiple on `date` and
    again, and the host's time of both in the second run."""
    columns = [Column("", text=True), Column("", text=True)]
    columns += [Column(when, group) for group in ("us", peer) for when in (date, "again")]
    columns += [Column("host us"), Column("host us", peer)]
    table = Table("", columns)
    for (operation, model, name), ours in now.items():
        if name == OURS:
            old, theirs = before[operation, model, name], [x[operation, model, peer] for x in (before, now)]
            cells = [f"{1e6 * row['p50_seconds']:.1f}" for row in (old, ours)]
            cells += [f"{row['slower_than_ours']:.2f}x" for row in theirs]
            cells += [f"{1e6 * row['host_seconds']:.0f}" for row in (ours, theirs[1])]
            table.rows.append([model, operation, *cells])
    return table


def on_gpus(documents: dict[str, Document], shown: Container[str]) -> str:
    """What bench/gpu.sh has measured, GPU by GPU: the kernels beside what PyTorch has, beside other libraries and with
    another ptxas, and the host's time. `documents` are by the names that scripts/gpu_results.py gives; those of
    `shown` stand elsewhere."""
    cards: dict[str, dict[str, Document]] = {}
    for name, document in documents.items():
        what, _, card = name.rpartition("-")
        cards.setdefault(card, {})[what] = document
    text = ""
    for card, found in sorted(cards.items()):
        parts = []
        if "microbench" in found and f"microbench-{card}" not in shown:
            parts.append(microbench(found["microbench"]))
        for peer in PEERS:
            if peer.key in found:
                parts.append(
                    f"Beside {peer.name.removeprefix('cat + ')}, in a run of its own:\n\n{_beside(found[peer.key])}"
                )
        if "eight-bits" in found:
            parts.append(f"Audio in 16 bits and in eight, in a run of its own:\n\n{_beside(found['eight-bits'])}")
        if "ptxas" in found and "microbench" in found:
            parts.append(_assembled(found["microbench"], found["ptxas"]))
        sweeps = [found[what]["rows"] for what in KERNEL_RESULTS if what.startswith("sweep-") and what in found]
        swept = [row for rows in sweeps for row in rows]
        if any(row["microseconds"] is not None for row in swept):
            parts.append(f"Of the tiles near the shipped one, the fastest:\n\n{_fastest(swept)}")
        if "host" in found:
            parts.append(f"The host's time of a call:\n\n{host_times(found['host'])}")
        if parts:
            text += f"### More on the GPU {card.upper()}\n\n" + "\n".join(parts)
    return text


def _assembled(before: Document, now: Document) -> str:
    """Our median times with Triton's ptxas and with another one."""
    versions = (document["machine_info"]["versions"] for document in (before, now))
    names = [version.get("ptxas", "Triton's own") for version in versions]  # older runs do not say it
    old, new = timed(before), timed(now)
    table = Table("", [Column("", text=True), Column("", text=True), *(Column(name, "us, ptxas") for name in names)])
    for (operation, model, name), ours in new.items():
        if name == OURS and (operation, model, name) in old:
            both = (old[operation, model, name], ours)
            table.rows.append([model, operation, *(f"{1e6 * row['p50_seconds']:.1f}" for row in both)])
    return f"Triton's own ptxas and a newer one:\n\n{to_markdown(table)}"


def host_times(document: Document) -> str:
    """The host's time of a call."""
    table = Table("", [Column("", text=True), Column("", text=True), Column("us")])
    table.rows = [[row["op"], row["implementation"], f"{row['host_microseconds']:.0f}"] for row in document["rows"]]
    return to_markdown(table)


# The kernels' goals by operation: shares of the limit by head dim, and how many times longer peers are to take. The
# share of decoding is meant for 75 MB and more, which only the 3B shape moves.
GOALS: dict[str, tuple[dict[int, float], dict[str, float]]] = {
    "forward": (
        {64: 0.50, 128: 0.55},
        {"cat + SDPA (flash)": 1.6, "cat + SDPA (cuDNN)": 1.4, "cat + FlexAttention": 1.7, "2 x SDPA + merge": 1.5},
    ),
    "backward": (
        {64: 0.38, 128: 0.38},
        {"cat + SDPA (flash)": 1.7, "cat + SDPA (cuDNN)": 1.1, "cat + FlexAttention": 1.5, "2 x SDPA + merge": 1.5},
    ),
    "decode": ({64: 0.75, 128: 0.75}, {"cat + SDPA (flash)": 2.0, "cat + FlexAttention": 1.5}),
}


def goals(document: Document) -> str:
    """Where each preset stands; what is short of its goal is bold."""
    figures = timed(document)
    head_dims = {row["params"]["model"]: row["params"]["head_dim"] for row in document["benchmarks"]}
    models = list(dict.fromkeys(model for _, model, _ in figures))
    table = Table("", [Column("", text=True), Column("goal"), *map(Column, models)])

    def add(heading: str, wanted: list[float], reached: list[float], unit: str = "") -> None:
        written = [f"{x:.2f}{unit}" for x in reached]
        cells = [text if x >= goal else f"**{text}**" for text, x, goal in zip(written, reached, wanted, strict=True)]
        goal = " / ".join(f"{goal:g}{unit}" for goal in dict.fromkeys(wanted))
        table.rows.append([heading, goal, *cells])

    for operation, (shares, peers) in GOALS.items():
        reached = [figures[operation, model, OURS]["share_of_limit"] for model in models]
        add(f"{operation}, share of the limit", [shares[head_dims[model]] for model in models], reached)
        for peer, goal in peers.items():
            slower = [figures[operation, model, peer]["slower_than_ours"] for model in models]
            add(f"{operation}, {peer}", [goal] * len(models), slower, "x")
    return to_markdown(table)
