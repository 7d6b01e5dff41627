"""Make committed results of what bench/gpu.sh has measured, and write the pages anew.

    python scripts/gpu_results.py OUTDIR             bench/results/<what>-<card>.json, pages and plots
    python scripts/gpu_results.py OUTDIR --replace   the same where such files are there already

What a stage wrote is taken where the stage is done; of Figure 1 also the points that it has where it was cut. What is
left out is said, each with the reason.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from palkernels.bench.kernels.pages import KERNEL_RESULTS

ROOT = Path(__file__).resolve().parents[1]
# What a stage writes in OUTDIR, by its name.
FIGURES = ("figure1", "compiled")
WRITTEN = {**{name: f"{name}/figure1.json" for name in FIGURES}, **{name: f"{name}.json" for name in KERNEL_RESULTS}}


def card(gpu: str) -> str:
    """Return a GPU's short name, as in the names of results: h200 of NVIDIA H200."""
    words = re.findall("[a-z0-9]+", gpu.lower())
    named = [word for word in words if re.search(r"\d", word)]
    if not named:
        sys.exit(f"the GPU's name must hold a number, got {gpu!r}: give --card")
    return str(named[0])


def collect(out: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return what is taken, as its stage wrote it, and why the rest is not."""
    stages: dict[str, dict[str, Any]] = json.loads((out / "stages.json").read_text())["stages"]
    taken, left_out = {}, {}
    for name, file in WRITTEN.items():
        status = stages.get(name, {}).get("status", "not begun")
        path = out / file
        cut_with_points = name in FIGURES and status == "cut" and path.exists()
        if status == "done" or (cut_with_points and json.loads(path.read_text())["rows"]):
            taken[name] = path.read_bytes()
        if status != "done":
            left_out[name] = "cut: the points that it has are taken" if name in taken else status
    return taken, left_out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUTDIR")
    parser.add_argument("--card", help="the GPU's name in the files' names  [default: from the GPU's own]")
    parser.add_argument("--replace", action="store_true", help="write over results that are there already")
    parser.add_argument("--results", type=Path, help="write there, and leave the pages  [default: bench/results]")
    options = parser.parse_args(arguments)
    if not (options.out / "stages.json").exists():
        sys.exit(f"OUTDIR must be what bench/gpu.sh wrote, got no stages.json in {str(options.out)!r}")
    name = options.card or card(json.loads((options.out / "stages.json").read_text())["gpu"])
    if not re.fullmatch("[a-z0-9]+", name):
        sys.exit(f"--card must be small letters and digits, got {name!r}")
    taken, left_out = collect(options.out)
    folder: Path = options.results or ROOT / "bench" / "results"
    files = {folder / f"{what}-{name}.json": content for what, content in taken.items()}
    present = [path.name for path in files if path.exists()]
    if present and not options.replace:
        sys.exit(f"results must not be there yet, or --replace be given, got {', '.join(present)}")
    for path, content in files.items():
        path.write_bytes(content)
        print(f"{path.name}")
    for what, reason in left_out.items():
        print(f"{what}: {reason}")
    if options.results is None:
        subprocess.run([sys.executable, str(ROOT / "scripts" / "update_docs.py")], check=True)


if __name__ == "__main__":
    main()
