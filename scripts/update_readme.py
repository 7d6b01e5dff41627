"""Write the tables of README.md, KERNELS.md and bench/LOG.md, and the plot, from the committed results.

python scripts/update_readme.py           rewrite them and the plot
python scripts/update_readme.py --check   exit with 1 if a table would change
"""

import json
import re
import sys
from pathlib import Path

from palkernels.bench import plot
from palkernels.bench.peers import OURS
from palkernels.bench.results import baseline_of, percent, reduction, speed_up

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "figure1-cpu.json"
MICROBENCH = ROOT / "bench" / "results" / "microbench-h200.json"


def table(document: dict) -> str:
    """A sentence with the run's conditions, and a row per mode and number of audio tokens."""
    meta, rows = document["meta"], document["rows"]
    lines = [
        f"{meta['model']} with {meta['layers']} of its {meta['full_layers']} layers, {meta['dtype']}, training batch "
        f"{meta['train_batch']}, inference batch {meta['infer_batch']}, {meta['text_tokens']} text tokens, "
        f"{meta['new_tokens']} new tokens, on {meta['device_name']} with {meta['threads']} threads, "
        f"{meta['date'][:10]}; medians of {meta['repeats']['train']} training steps and {meta['repeats']['infer']} "
        "inferences:",
        "",
        "| | audio tokens | PLITS samples/s | LAL samples/s | speed-up | peak memory | above static |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row["method"] != "lal":
            continue
        base = baseline_of(row, rows)
        if base is None:
            raise ValueError(f"every point must fit into memory with both methods, got {row['status']} or no baseline")
        rate, base_rate = (x["samples_per_second"]["p50"] for x in (row, base))
        lines.append(
            f"| {row['mode']} | {row['audio_tokens']} | {base_rate:.3g} | {rate:.3g} | {speed_up(row, base):.1f}x "
            f"| {percent(reduction(row, base, 'peak_memory_bytes'))} "
            f"| {percent(reduction(row, base, 'peak_above_static_bytes'))} |"
        )
    return "\n".join(lines) + "\n"


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


TABLES = {
    "README.md": ("figure1-cpu", table, RESULTS),
    "KERNELS.md": ("microbench-h200", microbench_table, MICROBENCH),
    "bench/LOG.md": ("goals-h200", goals_table, MICROBENCH),
}


def main() -> None:
    for name, (mark, write, results) in TABLES.items():
        path, content = ROOT / name, write(json.loads(results.read_text()))
        marked = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", re.DOTALL)
        old = path.read_text()
        new = marked.sub(lambda found, content=content: found[1] + content + found[2], old)
        if "--check" not in sys.argv[1:]:
            path.write_text(new)
        elif new != old:
            sys.exit(f"{name} must be as scripts/update_readme.py writes it")
    if "--check" not in sys.argv[1:]:
        RESULTS.with_suffix(".png").write_bytes(plot.render(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
