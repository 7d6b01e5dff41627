"""Files of rows as samples, and what is said of rows that give none."""

import json
import pickle

import pytest
from support.samples import row, write_clip, write_lines

from palkernels.model.data.reading import read
from palkernels.model.data.sample import Sample
from palkernels.model.data.sources import Source

CLIP = {"type": "audio", "audio": "{folder}/a.wav"}
TEXT_A = [{"type": "text", "text": "a"}]
ASKED = {"type": "text", "text": "Which word?"}
RED = {"role": "assistant", "content": "red"}
# Rows of each form, and the messages that they are.
FORMS = {
    "ms-swift": (row(), [{"role": "user", "content": [CLIP, ASKED]}, RED]),
    "parts": (
        row(["a.wav"] * 2, question=[*TEXT_A, {"type": "audio"}, {"type": "text", "text": "b<audio>"}]),
        [{"role": "user", "content": [{"type": "text", "text": "a"}, CLIP, {"type": "text", "text": "b"}, CLIP]}, RED],
    ),
    "clips in parts": (
        row(None, question=[{"type": "audio", "audio_url": "a.wav"}, ASKED]),
        [{"role": "user", "content": [CLIP, ASKED]}, RED],
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "<audio>Which word?"}, {"from": "gpt", "value": "red"}],
            "audios": ["a.wav"],
            "system": "Listen.",
        },
        [{"role": "system", "content": "Listen."}, {"role": "user", "content": [CLIP, ASKED]}, RED],
    ),
    "one audio": (
        {"conversations": row()["messages"], "audio": {"path": "a.wav", "bytes": None}},
        [{"role": "user", "content": [CLIP, ASKED]}, RED],
    ),
    "several turns": (
        {
            "messages": [
                {"role": "user", "content": "<audio>then<audio>"}, RED,
                {"role": "user", "content": "And?", "name": "Ada"}, {"role": "assistant", "content": "blue"},
            ],
            "audios": ["a.wav", "a.wav"],
        },
        [
            {"role": "user", "content": [CLIP, {"type": "text", "text": "then"}, CLIP]}, RED,
            {"role": "user", "content": "And?", "name": "Ada"}, {"role": "assistant", "content": "blue"},
        ],
    ),
    "text alone": (row(None, question="Which?"), [{"role": "user", "content": "Which?"}, RED]),
    "openaqa": (
        {"instruction": "Which word?", "input": "", "audio_id": "a.wav", "dataset": "d", "task": "", "output": "red"},
        [{"role": "user", "content": [CLIP, ASKED]}, RED],
    ),
    "openaqa's input": (
        {"instruction": "Which", "input": "word?", "audio_id": "a.wav", "output": "red"},
        [{"role": "user", "content": [CLIP, {"type": "text", "text": "Which\n\nword?"}]}, RED],
    ),
}  # fmt: skip


def expected(messages, folder):
    return tuple(json.loads(json.dumps(messages).replace("{folder}", str(folder))))


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, tmp_path):
    """As JSON lines and as an array, with the format told or not."""
    write_clip(tmp_path / "a.wav")
    record, messages = FORMS[form]
    lines = write_lines(tmp_path / "calls.jsonl", record)
    array = write_lines(tmp_path / "calls.json", json.dumps([record], indent=2))
    format = "openaqa" if form.startswith("openaqa") else "messages"
    for path, place in ((lines, "1"), (array, "item 1")):
        for source in (path, Source(path, format)):
            samples = read(source)
            assert list(samples) == [Sample(expected(messages, tmp_path), f"{path.name}:{place}")]
            assert samples.dropped == ()
            assert samples.seconds(samples[0]) == pytest.approx(0.1 * len(samples[0].clips()))


def test_bytes_around_the_rows(tmp_path):
    """A byte order mark, CRLF, blank lines, a line separator within a text, no line break at the end."""
    write_clip(tmp_path / "ü b.wav")
    one = json.dumps(row("ü b.wav", question="<audio>a\u2028b"), ensure_ascii=False).encode()
    path = tmp_path / "calls.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + one + b"\r\n\r\n  \r\n" + one)
    samples = read(path)
    assert [sample.source for sample in samples] == ["calls.jsonl:2", "calls.jsonl:5"]
    assert samples[0].messages[0]["content"][1]["text"] == "a\u2028b"
    assert samples[0].clips() == (str(tmp_path / "ü b.wav"),)


def test_where_paths_start(tmp_path):
    clip = write_clip(tmp_path / "sounds" / "a.wav")
    path = write_lines(
        tmp_path / "rows" / "calls.jsonl", row(str(clip)), row("../sounds/a.wav"), row(f"file://{clip}"), row("a.wav")
    )
    assert [sample.source for sample in read(path)] == [f"calls.jsonl:{line}" for line in (1, 2, 3)]
    moved = read(Source(path, folder=tmp_path / "sounds"))
    assert [sample.source for sample in moved] == [f"calls.jsonl:{line}" for line in (1, 2, 3, 4)]


def test_task_and_choices(tmp_path):
    path = write_lines(
        tmp_path / "calls.jsonl",
        row(None, question="a", task="words", choices=["red", "blue"]),
        row(None, question="b"),
    )
    first, second = read(Source(path, task="other"))
    assert (first.task, first.choices) == ("words", ("red", "blue"))
    assert (second.task, second.choices) == ("other", ())


NAN = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": NaN}]}'
# Rows that are dropped: the reason, and what the line says is wrong.
DROPPED = {
    "not JSON": ("{'messages': []}", "not a JSON object", "got JSONDecodeError"),
    "cut short": ('{"messages": [{"role": "user", "conte', "not a JSON object", "got JSONDecodeError"),
    "a list": ("[1, 2]", "not a JSON object", "got a list"),
    "not UTF-8": (b'{"messages": "\xff"}', "not a JSON object", "must be UTF-8"),
    "deep": ("[" * 100_000, "not a JSON object", "got RecursionError"),
    "digits": ('{"messages": ' + "9" * 5_000 + "}", "not a JSON object", "got ValueError"),
    "no messages": ({"text": "a"}, "malformed", "messages must be a list of at least one, got none"),
    "empty messages": ({"messages": []}, "malformed", "got an empty list"),
    "messages of text": ({"messages": "a"}, "malformed", "got a str"),
    "nested lists": ({"messages": [row()["messages"]]}, "malformed", "a message must be an object, got a list"),
    "role": ({"messages": [{"role": "robot", "content": "a"}]}, "malformed", "got 'robot'"),
    "role of another type": ({"messages": [{"role": ["user"], "content": "a"}]}, "malformed", "got ['user']"),
    "content": (row(None, question=3), "malformed", "content must be a string, got a int"),
    "NaN": (NAN, "malformed", "got NaN"),
    "half a pair": (row(None, question="\ud800"), "malformed", "got half a surrogate pair"),
    "part": (row(None, question=[{"type": "image"}]), "malformed", "got 'image'"),
    "choices": (row(None, question="a", choices="red"), "malformed", "choices must be a list of strings"),
    "task": (row(None, question="a", task=3), "malformed", "task must be a string"),
    "audio of a number": (row([3]), "malformed", "audio must be a path, got a int"),
    "no answer": ({"messages": row()["messages"][:1], "audios": ["a.wav"]}, "no answer", "got the user's"),
    "empty answer": (row(answer=" \n"), "no answer", "got an empty answer"),
    "null answer": (row(answer=None), "no answer", "got none"),
    "fewer clips": (row([]), "audio count", "a clip for each <audio>, got fewer"),
    "more clips": (row(["a.wav", "a.wav"]), "audio count", "<audio> for each of 2 audios, got 1"),
    "no marks": (row(question="Which?"), "audio count", "<audio> for each of 1 audios, got 0"),
    "missing": (row("gone.wav"), "audio missing", "gone.wav' must exist"),
    "null path": (row([None]), "audio missing", "audio must be a path, got none"),
    "address": (row("https://example.org/a.wav"), "audio missing", "got the address"),
    "unreadable": (row("text.wav"), "audio unreadable", "text.wav'"),
    "cut off": (row("cut.wav"), "audio unreadable", "cut short"),
    "empty file": (row("empty.wav"), "audio unreadable", "got an empty file"),
    "folder": (row("."), "audio unreadable", "got a directory"),
    "too long": (row("long.wav"), "too long", "long.wav' must be at most 0.5 s long, got 0.60 s"),
}  # fmt: skip


@pytest.fixture
def clips(tmp_path):
    clip = write_clip(tmp_path / "a.wav")
    write_clip(tmp_path / "long.wav", 0.6)
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "cut.wav").write_bytes(clip.read_bytes()[:2000])
    (tmp_path / "empty.wav").touch()
    return tmp_path


@pytest.mark.parametrize("case", DROPPED)
def test_rows_that_are_dropped(case, clips):
    """They are listed by reason and place, between rows that are read."""
    broken, reason, detail = DROPPED[case]
    path = write_lines(clips / "calls.jsonl", row(), broken, row())
    samples = read(path, max_seconds=0.5)
    assert [sample.source for sample in samples] == ["calls.jsonl:1", "calls.jsonl:3"]
    (dropped,) = samples.dropped
    assert (dropped.source, dropped.reason) == ("calls.jsonl:2", reason)
    assert dropped.detail.startswith("calls.jsonl:2: ")
    assert detail in dropped.detail
    assert len(dropped.detail.splitlines()) == 1
    assert samples.reasons() == {reason: 1}
    assert samples.summary() == f"2 samples of 3; dropped: 1 {reason}"


def test_openaqa_rows_that_are_dropped(clips):
    fine = {"instruction": "a", "input": "", "audio_id": "a.wav", "task": "caption", "output": "b"}
    broken = [fine | {"output": ""}, fine | {"output": None}, fine | {"audio_id": None}, fine | {"instruction": 3}, "a"]
    path = write_lines(clips / "openaqa.json", json.dumps([fine, *broken]))
    samples = read(path)
    assert [sample.task for sample in samples] == ["caption"]
    assert samples.reasons() == {"no answer": 2, "audio missing": 1, "malformed": 1, "not a JSON object": 1}
    assert samples.dropped[0].source == "openaqa.json:item 2"


# Files of no format at all, and what the error says.
FOREIGN = {
    "a.jsonl": (b"question,answer\na,b\n", r"a\.jsonl:1 must be a JSON object a line, .* got 'question,answer'"),
    "b.jsonl": (b"\n\nRIFF\x00\xff", r"b\.jsonl:3 must be a JSON object a line"),
    "c.json": (b'[{"messages": []},\n {"messages": \n', r"c\.json:3 must go on with a JSON array"),
    "d.json": (b'[\n"\xff"]', r"d\.json:2 must be UTF-8"),
    "e.jsonl": (b"", r"e\.jsonl must hold at least one row .*, got an empty file"),
    "f.jsonl": (b"\n \n", r"f\.jsonl must hold at least one row"),
    "g.json": (b"[]", r"g\.json must hold at least one row"),
    "h.json": (b'{\n"messages": []\n}', r"h\.json must hold at least one row .* 3 not a JSON object"),
    "i.jsonl": (b'{"messages": []}\n{}', r"got 0 samples of 2; dropped: 2 malformed: i\.jsonl:1: messages must be"),
    "j.jsonl": (b'{"question": "a"}', r"j\.jsonl must hold messages .* got 'question'"),
    "k.csv": (b"a,b", r"^k\.csv must end with \.jsonl, .* got 'k\.csv'"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_are_refused(name, tmp_path):
    content, message = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="path must exist, got no such file"):
        read(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match=r"path must exist, got no such file: .*gone\.txt"):
        read(Source(tmp_path / "gone.txt", "messages"))
    with pytest.raises(ValueError, match="format must be auto or columns for a folder, got 'openaqa'"):
        read(Source(tmp_path, "openaqa"))
    with pytest.raises(ValueError, match="format must be one of auto, "):
        Source("a.jsonl", "csv")
    for weight in (0, -1.0, float("nan"), float("inf"), True, "1"):
        with pytest.raises(ValueError, match="weight must be a positive number"):
            Source("a.jsonl", weight=weight)


def test_a_file_named_often_is_looked_at_once(tmp_path, monkeypatch):
    from palkernels.model.data import clips

    write_clip(tmp_path / "a.wav")
    looked = []
    original = clips.clip_length
    monkeypatch.setattr(clips, "clip_length", lambda clip: looked.append(clip) or original(clip))
    samples = read(write_lines(tmp_path / "calls.jsonl", *[row()] * 50))
    assert len(samples) == 50
    assert samples.seconds(samples[7]) == pytest.approx(0.1)
    assert looked == [str(tmp_path / "a.wav")]


def test_samples_are_a_sequence_that_can_be_pickled(clips):
    samples = read(write_lines(clips / "calls.jsonl", row(), row("gone.wav"), row(answer="blue")))
    again = pickle.loads(pickle.dumps(samples))
    assert list(again) == list(samples) == [samples[0], samples[-1]]
    assert again.dropped == samples.dropped
    assert [sample.messages[-1]["content"] for sample in samples[1:]] == ["blue"]
    assert samples[1:].reasons() == {"audio missing": 1}
