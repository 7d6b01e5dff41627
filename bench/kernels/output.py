"""A microbenchmark's measurements as a table, and as a file in pytest-benchmark's format, which `pytest-benchmark
compare` reads."""

from __future__ import annotations

import platform
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from palkernels.bench import machine
from palkernels.bench.instruments.rates import Rates
from palkernels.bench.kernels.cases import Case
from palkernels.bench.kernels.measurement import Measurement, times_ours
from palkernels.bench.options import dtype_name
from palkernels.bench.report.table import Column, Table
from palkernels.bench.versions import find_assembler

__all__ = ["CAPTION", "about", "document", "notes", "table"]

CAPTION = "'slower' is the time over palkernels'. 'limit': the least time at the ceilings, over the time."


def about(device: torch.device, ceilings: Rates) -> dict[str, Any]:
    """Describe the machine, before anything can break it. `ceilings` are the rates that it reaches at best."""
    on_gpu = device.type == "cuda"
    versions = {x: machine.package_version(x) for x in ("palkernels", "torch", "triton", "pytest-benchmark")}
    if on_gpu:
        major, minor = torch.cuda.get_device_capability(device)
        versions["ptxas"] = find_assembler(10 * major + minor).version
    return {
        "node": "",
        "system": platform.system(),
        "python_version": platform.python_version(),
        "cpu": {"brand_raw": machine.cpu_name()},
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "versions": versions,
        "ceilings": asdict(ceilings),
    }


def table(rows: list[Measurement], ceilings: Rates, machine_info: dict[str, Any]) -> Table:
    """Return the table that is printed: the implementations of each case under each other. CAPTION explains it."""
    device = machine_info["gpu"] or machine_info["cpu"]["brand_raw"]
    rates = f"{ceilings.flops_per_second / 1e12:.3g} TFLOP/s, {ceilings.bytes_per_second / 1e12:.3g} TB/s"
    columns = [Column("operation", text=True), Column("implementation", text=True)]
    columns += [Column(heading, "median us and its spread") for heading in ("median", "p10", "p90")]
    columns += [Column(heading) for heading in ("rate", "limit", "slower")]
    shown = Table(f"{device}, {dtype_name(rows[0].case.dtype)}; measured ceilings {rates}", columns)
    for row in rows:
        case = row.case
        cells = [_case_name(case), row.name]
        shown.rows.append(cells)
        if not row.samples:
            cells.append("-")
            continue
        p10, p50, p90 = (row.percentile(x) for x in (10, 50, 90))
        rate = f"{case.bytes / p50 / 1e12:.3g} TB/s" if case.counts_bytes else f"{case.flops / p50 / 1e12:.3g} TFLOP/s"
        slower = times_ours(row, rows)
        cells += [f"{1e6 * seconds:.1f}" for seconds in (p50, p10, p90)]
        cells += [rate, f"{row.share_of_limit(ceilings):.0%}", "" if slower is None else f"{slower:.2f}x"]
    return shown


def _case_name(case: Case) -> str:
    """Return the operation, the model if it is one's shape, and the number of audio tokens."""
    return " ".join(filter(None, (case.op, case.model, str(case.audio))))


def notes(rows: list[Measurement]) -> list[str]:
    """Say why rows have no time; what holds for every case of an implementation is said once."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if not row.samples:
            cases.setdefault((row.name, row.status), []).append(_case_name(row.case))
    return [
        f"{name}: {status}" + ("" if status.startswith("not installed") else f" ({', '.join(where)})")
        for (name, status), where in cases.items()
    ]


def document(
    rows: list[Measurement], ceilings: Rates, machine_info: dict[str, Any], options: dict[str, Any], complete: bool
) -> dict[str, Any]:
    """Return pytest-benchmark's file; what it has no place for is in each entry's `extra_info`. `options` are what the
    user asked for; `complete` says whether every case is there."""
    from pytest_benchmark.stats import Stats

    benchmarks = []
    for row in rows:
        case = row.case
        params = {
            "op": case.op, "model": case.model, "batch": case.batch, "heads": case.heads, "kv_heads": case.kv_heads,
            "text_tokens": case.text, "audio_tokens": case.audio, "head_dim": case.head_dim, "layers": case.layers,
            "dtype": dtype_name(case.dtype), "implementation": row.name,
        }  # fmt: skip
        extra: dict[str, Any] = {
            "status": row.status, "error": row.error, "flops": case.flops, "bytes": case.bytes,
            "limit_seconds": case.limit(ceilings), "host_seconds": row.host_seconds,
        }  # fmt: skip
        stats: dict[str, Any] = {}
        if row.samples:
            measured = Stats()
            for sample in row.samples:
                measured.update(sample)
            stats = measured.as_dict() | {"iterations": 1}
            extra |= {f"p{x}_seconds": row.percentile(x) for x in (10, 50, 90)}
            extra |= {"share_of_limit": row.share_of_limit(ceilings), "slower_than_ours": times_ours(row, rows)}
        group = f"{case.op} {case.model or 'shape'} {case.audio}"
        benchmarks.append(
            {"group": group, "name": row.name, "fullname": f"{group} {row.name}", "params": params, "param": None,
             "extra_info": extra, "options": options, "stats": stats}
        )  # fmt: skip
    return {
        "machine_info": machine_info,
        "commit_info": {},
        "benchmarks": benchmarks,
        "complete": complete,
        "datetime": datetime.now(UTC).isoformat(),
        "version": machine_info["versions"]["pytest-benchmark"],
    }
