"""A folder of generated clips with their questions: `make` writes it, once and for all.

    manifest.json       settings, versions, and the SHA-256 of every JSONL file; written last: it says that all is there
    TASK/train.jsonl    a line a question, as training reads it: messages, audios, task, choices
    TASK/test.jsonl
    TASK/clips.jsonl    a line a clip: its file, SHA-256, seconds, split and answer, whether its combination is new, and
                        what it was made of
    TASK/train/00000.wav, or 00000-0.wav and 00000-1.wav where a question has two

Whatever ends `make`, `kill -9` included, a later call goes on after the last whole batch. A file is written under
another name and renamed, so that none is half there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from palkernels.bench.errors import UserError, one_line
from palkernels.bench.machine import package_version
from palkernels.bench.study.sounds.drawing import SPLITS, Question, question
from palkernels.bench.study.sounds.espeak import Speaker, SpeechError
from palkernels.bench.study.sounds.registry import TASKS
from palkernels.bench.study.sounds.signals import RATE, wav
from palkernels.bench.study.sounds.tasks import Task

__all__ = ["Manifest", "Settings", "make"]

FORM = 1  # of the sounds and files; another one makes another folder
MANIFEST, CLAIM, BATCHES = "manifest.json", "unfinished.json", "batches"
BATCH = 25  # questions that are made anew if a run ends amid them
PACKAGES = ("espeakng-loader", "numpy", "torch", "torchaudio")  # what the samples are computed with


@dataclass(frozen=True)
class Settings:
    """What a folder holds.

    Attributes:
        train, test: Questions of each task in either split. A larger folder begins with a smaller one's.
        tasks: Names of `TASKS`.
        seed: Of all chance.
    """

    train: int = 400
    test: int = 100
    tasks: tuple[str, ...] = tuple(TASKS)
    seed: int = 0


@dataclass(frozen=True)
class Manifest:
    """What a finished folder holds.

    Attributes:
        folder: Where it is.
        settings: What it was made by.
        versions: The packages that it was made with.
        files: The SHA-256 of every JSONL file, by its path in the folder.
        clips, seconds: How many clips there are, and how long they are together.
    """

    folder: Path
    settings: Settings
    versions: dict[str, str | None]
    files: dict[str, str]
    clips: int
    seconds: float

    def path(self, task: str, split: str) -> Path:
        """Return the JSONL file of a task's split."""
        return self.folder / task / f"{split}.jsonl"


def make(folder: Path, settings: Settings, console: Console | None = None) -> Manifest:
    """Make the clips and questions that the settings ask for, or go on with them, and return what the folder holds.

    The same settings give the same bytes, with the same versions of packages on the same kind of processor. A finished
    folder is checked, file by file, and left as it is.

    Args:
        folder: New, empty, or made by the same settings.
        console: Shows the progress.

    Raises:
        UserError: The settings are not usable; the folder holds something else or damaged files, is in use by another
            process, or cannot be written; or a spoken task is asked for, and espeakng-loader is missing or broken.
    """
    _check(settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            wanted = _made_by(settings)
            if not (folder / MANIFEST).exists():
                _claim(folder, wanted)
                _generate(folder, settings, wanted, console)
            manifest = _read(folder, settings, wanted)
            _tidy(folder)
            return manifest
    except (SpeechError, ModuleNotFoundError) as error:
        raise UserError(one_line(error)) from error
    except OSError as error:
        raise UserError(f"{str(folder)!r} must be a folder that can be written to, got {one_line(error)}") from error


def _check(settings: Settings) -> None:
    if not settings.tasks or len(set(settings.tasks)) < len(settings.tasks) or not set(settings.tasks) <= set(TASKS):
        got = ", ".join(settings.tasks)
        raise UserError(f"tasks must be distinct names out of {', '.join(TASKS)}, got {got!r}")
    for name in ("train", "test"):
        if not 1 <= getattr(settings, name) <= 99_999:
            raise UserError(f"{name} must be from 1 to 99999 questions, got {getattr(settings, name)}")
    if not 0 <= settings.seed < 2**32:
        raise UserError(f"seed must be from 0 to 2**32 - 1, got {settings.seed}")


def _made_by(settings: Settings) -> dict[str, Any]:
    """Return what decides a folder's bytes, in JSON's types."""
    versions = {name: package_version(name) for name in PACKAGES}
    made_by = {"form": FORM, "settings": dataclasses.asdict(settings), "versions": versions}
    in_json: dict[str, Any] = json.loads(json.dumps(made_by))
    return in_json


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from making the folder at the same time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{str(folder)!r} must be free, got a folder that another process is making") from None
        yield
    finally:
        os.close(descriptor)


def _claim(folder: Path, wanted: dict[str, Any]) -> None:
    """Say what the folder is going to hold, or make sure that it was begun as that."""
    claim = folder / CLAIM
    if claim.exists():
        _same_or_refused(folder, "begun", json.loads(claim.read_bytes()), wanted)
    elif any(path.name != f".{CLAIM}" for path in folder.iterdir()):
        raise UserError(f"{str(folder)!r} must be new, empty or made by the same settings, got a folder of other files")
    else:
        _write(claim, _json(wanted))


def _same_or_refused(folder: Path, how: str, by: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Make sure that a folder was begun or made by what is wanted of it."""
    before, now = ({**made_by, **made_by["settings"]} for made_by in (by, wanted))
    for name in (name for name in now if name != "settings"):
        if before.get(name) != now[name]:
            raise UserError(
                f"{str(folder)!r} must be new or {how} with {name} {now[name]}, got a folder with {before.get(name)}"
            )


def _generate(folder: Path, settings: Settings, wanted: dict[str, Any], console: Console | None) -> None:
    """Make what is missing, and the manifest last."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    total = len(settings.tasks) * (settings.train + settings.test)
    files: dict[str, str] = {}
    clips, seconds = 0, 0.0
    with (
        Progress(*columns, TimeRemainingColumn(), console=console, disable=console is None) as progress,
        contextlib.ExitStack() as stack,
    ):
        bar = progress.add_task("sounds", total=total)
        speaker: Speaker | None = None
        for name in settings.tasks:
            progress.update(bar, description=f"{name:9}")
            facts: list[dict[str, Any]] = []
            for split in SPLITS:
                lines: list[dict[str, Any]] = []
                count = getattr(settings, split)
                for start in range(0, count, BATCH):
                    record = folder / BATCHES / f"{name}-{split}-{start:05}.json"
                    if not record.exists():
                        if TASKS[name].speaks and speaker is None:
                            speaker = stack.enter_context(Speaker())
                        places = range(start, min(start + BATCH, count))
                        made = [
                            _questions(folder, TASKS[name], split, place, settings.seed, speaker) for place in places
                        ]
                        _write(record, _json(made))
                    for entry in json.loads(record.read_bytes()):
                        lines.append(entry["line"])
                        facts += entry["clips"]
                    progress.update(bar, advance=min(BATCH, count - start))
                files[f"{name}/{split}.jsonl"] = _write(folder / name / f"{split}.jsonl", _jsonl(lines))
            files[f"{name}/clips.jsonl"] = _write(folder / name / "clips.jsonl", _jsonl(facts))
            clips, seconds = clips + len(facts), seconds + sum(fact["seconds"] for fact in facts)
    _write(folder / MANIFEST, _json(wanted | {"files": files, "clips": clips, "seconds": round(seconds, 3)}))


def _questions(folder: Path, task: Task, split: str, place: int, seed: int, speaker: Speaker | None) -> dict[str, Any]:
    """Write the clips of one question; return its line, and a line for each clip."""
    asked: Question = question(task, split, place, seed, speaker)
    item = asked.item
    names = [f"{split}/{place:05}{f'-{index}' if task.clips > 1 else ''}.wav" for index in range(task.clips)]
    clips = []
    for name, signal in zip(names, item.clips, strict=True):
        digest = _write(folder / task.name / name, wav(signal))
        about = {"file": name, "sha256": digest, "seconds": len(signal) / RATE, "split": split, "answer": item.answer}
        clips.append({**about, "asked": item.asked, "new_combination": asked.new, **item.facts})
    messages = [{"role": "user", "content": asked.text}, {"role": "assistant", "content": item.answer}]
    line = {"messages": messages, "audios": names, "task": task.name, "choices": list(task.choices)}
    return {"line": line, "clips": clips}


def _read(folder: Path, settings: Settings, wanted: dict[str, Any]) -> Manifest:
    """Return what a finished folder holds, once every file is known to be as it was made."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        made_by = {key: content[key] for key in ("form", "settings")}
        manifest = Manifest(folder, settings, *(content[key] for key in ("versions", "files", "clips", "seconds")))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(folder / MANIFEST)!r} must be a manifest of sounds, got {one_line(error)}") from error
    _same_or_refused(folder, "made", made_by, {key: wanted[key] for key in made_by})
    for name, digest in manifest.files.items():
        _same(folder, folder / name, digest)
        if name.endswith("/clips.jsonl"):
            for line in (folder / name).read_text(encoding="utf-8").splitlines():
                clip = json.loads(line)
                _same(folder, (folder / name).parent / clip["file"], clip["sha256"])
    return manifest


def _same(folder: Path, path: Path, digest: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    if found != digest:
        got = "no file" if found is None else "another content"
        raise UserError(f"{str(path)!r} must be as it was made, got {got}: remove {str(folder)!r} to make it again")


def _tidy(folder: Path) -> None:
    """Remove what only an unfinished folder needs."""
    shutil.rmtree(folder / BATCHES, ignore_errors=True)
    (folder / CLAIM).unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> str:
    """Write a whole file or none; return the content's SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")  # always the same, so that what an ended run left is overwritten
    with temporary.open("wb") as file:
        file.write(content)
        if path.suffix != ".wav":  # clips are compared with their hashes before they are used
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)
    return hashlib.sha256(content).hexdigest()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _jsonl(lines: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines).encode()
