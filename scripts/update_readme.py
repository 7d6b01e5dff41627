"""Write the README's table and plot from the committed results, so that no figure is typed by hand.

python scripts/update_readme.py           rewrite README.md and the plot
python scripts/update_readme.py --check   exit with 1 if the README's table would change
"""

import json
import re
import sys
from pathlib import Path

from palkernels.bench import plot
from palkernels.bench.results import baseline_of, percent, reduction, speed_up

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "figure1-cpu.json"
MARKED = re.compile(r"(<!-- figure1-cpu -->\n).*?(<!-- end -->)", re.DOTALL)


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


def main() -> None:
    document = json.loads(RESULTS.read_text())
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = MARKED.sub(lambda found: found[1] + table(document) + found[2], old)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if new == old else "README.md must be as scripts/update_readme.py writes it")
    readme.write_text(new)
    RESULTS.with_suffix(".png").write_bytes(plot.render(document))


if __name__ == "__main__":
    main()
