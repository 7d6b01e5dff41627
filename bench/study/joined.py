"""Results of one study that were made apart, as on several machines, a seed to each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palkernels.bench.errors import UserError, one_line

__all__ = ["check_sounds", "joined", "load"]

MAY_DIFFER = ("methods", "seeds")  # of the settings


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the result in a file.

    Raises:
        UserError: the file is none, or of a study with other settings.
    """
    try:
        study: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        before = joined([study])["meta"]["settings"]
        whole = "sounds" in study["meta"] and all(run["points"][-1]["by_task"] for run in study["runs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        got = one_line(error, with_type=True)
        raise UserError(f"--join must be the study.json of another run, got {str(path)!r}: {got}") from error
    for name, value in settings.items():
        if name not in MAY_DIFFER and before.get(name) != value:
            raise UserError(
                f"--join must be of a study with the same settings, got {str(path)!r} with {name} {before.get(name)}, "
                f"not {value}"
            )
    if not (whole and study["runs"]):
        raise UserError(f"--join must have sounds and finished runs, got none in {str(path)!r}")
    return study


def check_sounds(studies: Sequence[dict[str, Any]], sounds: dict[str, Any]) -> None:
    """Raise a UserError if a study is of other sounds."""
    for study in studies:
        if study["meta"]["sounds"] != sounds:
            raise UserError("--join must be of a study with the same sounds, got others: another version made them")


def joined(studies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one result of several of the same settings, each run once: the first of these that has it counts."""
    first = studies[0]
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for study in studies:
        for run in study["runs"]:
            runs.setdefault((run["method"], run["seed"]), run)
    settings = [study["meta"]["settings"] for study in studies]
    methods = list(dict.fromkeys(name for one in settings for name in one["methods"]))
    seeds = sorted({seed for one in settings for seed in one["seeds"]})
    metas = [study["meta"] for study in studies]
    machines = ", ".join(dict.fromkeys(one["cpu"] for one in metas))
    meta = {**first["meta"], "cpu": machines, "date": max(one["date"] for one in metas)}
    meta |= {"jobs": max(one["jobs"] for one in metas), "versions": _all_versions(metas)}
    meta["settings"] = {**meta["settings"], "methods": methods, "seeds": seeds}
    ordered = sorted(runs.values(), key=lambda run: (run["seed"], methods.index(run["method"])))
    return {"meta": meta, "runs": ordered}


def _all_versions(metas: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the versions of each package, of which there is one where the machines have the same."""
    names = dict.fromkeys(name for meta in metas for name in meta["versions"])
    return {name: ", ".join(dict.fromkeys(str(meta["versions"].get(name)) for meta in metas)) for name in names}
