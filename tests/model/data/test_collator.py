"""Batches of samples: exact labels, clips decoded in workers, and errors that name the sample."""

import pickle

import pytest
import torch
from support.audio_llm import AUDIO_ID, INTEGRATIONS, TOKENIZER, entry
from support.samples import model_and_processor, row, sample, small_processor, write_clip, write_damaged, write_lines
from torch.utils.data import DataLoader

from palkernels.model import AudioError
from palkernels.model.data.collator import Collator
from palkernels.model.data.reading import read
from palkernels.model.data.sample import Sample


@pytest.fixture
def clips(tmp_path):
    lengths = {"a": 0.1, "b": 0.04, "c": 0.02}
    return {name: write_clip(tmp_path / f"{name}.wav", seconds) for name, seconds in lengths.items()}


def several(clips):
    """Samples with one clip, two of them, none, and of several turns."""
    turns = sample([clips["c"]], "c", "one", "t.jsonl:4")
    more = ({"role": "user", "content": "And?"}, {"role": "assistant", "content": "zwö"})
    object.__setattr__(turns, "messages", turns.messages + more)
    return [
        sample([clips["a"]], "a", "red"),
        sample([clips["b"], clips["a"]], "b", "blue or so"),
        sample([], "none", "green"),
        turns,
    ]


# Each sample's pieces of text, learned or not; {} is where a clip's placeholders stand.
PIECES = [
    [("[user]{a}a[assistant]", 0), ("red<|end|>", 1)],
    [("[user]{b}{a}b[assistant]", 0), ("blue or so<|end|>", 1)],
    [("[user]none[assistant]", 0), ("green<|end|>", 1)],
    [("[user]{c}c[assistant]", 0), ("one<|end|>", 1), ("[user]And?[assistant]", 0), ("zwö<|end|>", 1)],
]


def by_hand(placeholders):
    """Ids and labels of each sample's row, without padding."""
    marks = {name: "<|AUDIO|>" * count for name, count in placeholders.items()}
    for pieces in PIECES:
        ids, labels = [], []
        for text, learned in pieces:
            tokens = TOKENIZER(text.format(**marks))["input_ids"]
            ids += tokens
            labels += tokens if learned else [-100] * len(tokens)
        yield ids, labels


WAYS = {
    "lal": ([entry("whisper")], {}, {"a": 0, "b": 0, "c": 0}),
    "plits": ([entry("whisper", "plits")], {}, {"a": 5, "b": 2, "c": 1}),
    "summary": ([entry("whisper")], {"summary_tokens": 2}, {"a": 2, "b": 2, "c": 2}),
}


@pytest.mark.parametrize("way", WAYS)
def test_labels_are_the_answers(way, clips):
    """Of every turn of the assistant, with what ends it; never at padding, placeholders and questions."""
    encoders, settings, placeholders = WAYS[way]
    collate = Collator(small_processor(*encoders, **settings))
    batch = collate(several(clips))
    for i, (ids, labels) in enumerate(by_hand(placeholders)):
        padding = batch["input_ids"].shape[1] - len(ids)
        assert batch["input_ids"][i].tolist() == ids + [TOKENIZER.pad_token_id] * padding
        assert batch["labels"][i].tolist() == labels + [-100] * padding
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + [0] * padding
    assert batch["audio_index"].tolist() == [[0, -1], [1, 0], [-1, -1], [2, -1]]  # a clip heard twice comes once
    assert batch["audio_lengths"].tolist() == [[5], [2], [1]]


@pytest.mark.parametrize("way", INTEGRATIONS)
def test_every_connector_gets_a_gradient_from_texts_alone(way):
    """Else DDP fails and FSDP hangs at the batch after."""
    encoders, settings = INTEGRATIONS[way]
    model, processor = model_and_processor(*encoders, **settings)
    batch = Collator(processor)([sample(), sample(answer="blue")])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    model.train()
    model(**batch).loss.backward()
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert any("projector" in name for name in trained)
    assert [name for name in trained if model.get_parameter(name).grad is None] == []


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_make_the_same_batches(method, clips):
    collate, samples = Collator(small_processor(entry("whisper", "plits"))), several(clips)
    loader = DataLoader(samples, 2, collate_fn=collate, num_workers=2, multiprocessing_context=method)
    batches = list(loader)
    assert len(batches) == 2
    for got, want in zip(batches, [collate(samples[:2]), collate(samples[2:])], strict=True):
        assert got.keys() == want.keys()
        for name in want:
            assert torch.equal(got[name], want[name]), name
    assert pickle.loads(pickle.dumps(collate))(samples)["labels"].tolist() == collate(samples)["labels"].tolist()


def test_a_clip_that_cannot_be_decoded_names_its_sample(clips, tmp_path):
    """Its header is whole, so that reading cannot tell."""
    broken = write_damaged(tmp_path / "broken.flac")
    path = write_lines(tmp_path / "calls.jsonl", row(clips["a"]), row(broken))
    samples = read(path)
    assert len(samples) == 2
    with pytest.raises(AudioError, match=r"^calls\.jsonl:2: audio file .*broken\.flac.* must") as caught:
        Collator(small_processor())(samples)
    assert len(str(caught.value).splitlines()) == 1


def test_a_text_that_is_refused_names_its_sample():
    with pytest.raises(ValueError, match=r"^b\.jsonl:2: .*<\|AUDIO\|>"):
        Collator(small_processor())([sample(), sample(question="<|AUDIO|>", source="b.jsonl:2")])


def rows_of(folder, clips):
    """One short; one with a long text; one with a clip that is too long; one with the audio token."""
    write_clip(folder / "long.wav", 1.5)
    return write_lines(
        folder / "calls.jsonl",
        row(clips["a"]), row(clips["c"], "b" * 60), row("long.wav"), row(clips["b"], "<|AUDIO|>"), row("gone.wav"),
    )  # fmt: skip


def test_samples_that_do_not_fit_are_dropped_before_training(clips, tmp_path):
    collate = Collator(small_processor(entry("whisper", "plits"), max_seconds=1.0), max_tokens=50)
    samples = read(rows_of(tmp_path, clips))
    fitting = collate.fitting(samples)
    assert [one.source for one in fitting] == ["calls.jsonl:1"]
    assert fitting.reasons() == {"audio missing": 1, "too many tokens": 1, "too long": 1, "malformed": 1}
    detail = {one.reason: one.detail for one in fitting.dropped}
    assert detail["too many tokens"].startswith("calls.jsonl:2: a text must have at most 50 tokens with its placehold")
    assert "long.wav' must be at most 1 s long, got 1.50 s" in detail["too long"]
    with pytest.raises(ValueError, match=r"calls\.jsonl:2: a text must have at most 50 tokens .*, got 9\d"):
        collate(samples[:2])
    with pytest.raises(ValueError, match="samples must hold at least one that fits, got 0 samples of"):
        Collator(small_processor(), max_tokens=3).fitting(samples)


# A template without marks that shows the last turns of a conversation alone, so that its beginning is another text.
FORGETFUL = (
    "{% for m in messages[-2:] %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# One that refuses a conversation which does not begin with the user, and leaves an answer of "none" out.
STRICT = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('must begin with the user') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.content != 'none' %}{{ m.content }}{% endif %}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)


@pytest.mark.parametrize(("template", "reason"), [(FORGETFUL, "malformed"), (STRICT, "no answer")])
def test_samples_whose_labels_the_template_cannot_give_are_dropped(template, reason, clips):
    good, odd = sample([clips["a"]]), sample([clips["a"]], answer="none", source="a.jsonl:2")
    if template is FORGETFUL:
        earlier = ({"role": "user", "content": "And?"}, {"role": "assistant", "content": "so"})
        odd = Sample((*earlier, *sample([clips["a"]]).messages), "a.jsonl:2")
    answer_first = Sample((good.messages[1], *good.messages), "a.jsonl:3")
    collate = Collator(small_processor())
    collate.processor.chat_template = template
    fitting = collate.fitting([good, odd, answer_first])
    assert [one.source for one in fitting] == ["a.jsonl:1"]
    reasons = {one.source: (one.reason, one.detail) for one in fitting.dropped}
    assert reasons["a.jsonl:2"][0] == reason
    if template is STRICT:
        assert reasons["a.jsonl:3"] == ("malformed", "a.jsonl:3: TemplateError: must begin with the user")
        assert bool((collate([odd])["labels"] == -100).all())  # whose loss would be no number
    else:
        with pytest.raises(ValueError, match="chat_template must mark what the assistant says"):
            collate([odd])


@pytest.mark.parametrize("way", WAYS)
def test_the_limit_counts_what_batches_hold(way, clips, tmp_path):
    """A text of just so many tokens fits, and lengths for buckets count them and what else is heard."""
    encoders, settings, placeholders = WAYS[way]
    samples = several(clips)
    tokens = [len(ids) for ids, _ in by_hand(placeholders)]
    for one, count in zip(samples, tokens, strict=True):
        processor = small_processor(*encoders, **settings)
        assert len(Collator(processor, max_tokens=count).fitting([one])) == 1
        assert Collator(processor, max_tokens=count)([one])["input_ids"].shape == (1, count)
        with pytest.raises(ValueError, match=f"got 0 samples of 1; dropped: 1 too many tokens: .*, got {count}$"):
            Collator(processor, max_tokens=count - 1).fitting([one])
    heard = [0] * 4 if way == "plits" else [5, 7, 0, 1]
    lengths = Collator(small_processor(*encoders, **settings)).lengths(samples)
    assert lengths == [count + states for count, states in zip(tokens, heard, strict=True)]


def test_lengths_of_clips_with_several_windows(tmp_path):
    """As many placeholders and states as a batch has, of an encoder that hears 10.24 s at once and one of 30 s."""
    processor = small_processor(entry("sslam", "plits"), entry("whisper"))
    collate = Collator(processor)
    for seconds in (10.24, 10.25, 21.0, 31.3):
        one = sample([write_clip(tmp_path / f"{seconds}.wav", seconds)])
        batch = collate([one])
        assert collate.lengths([one]) == [batch["input_ids"].shape[1] + int(batch["audio_lengths"][0, 1])]


def test_nothing_is_cut_by_what_a_tokenizer_was_saved_with(clips):
    """One that says truncation where it is loaded would cut answers."""
    from palkernels.model import byte_tokenizer

    processor = small_processor()
    processor.tokenizer = byte_tokenizer()
    processor.tokenizer.init_kwargs |= {"truncation": True, "max_length": 20, "padding": "max_length"}
    batch = Collator(processor)([sample([clips["a"]], answer="red" * 20)])
    assert batch["input_ids"].shape[1] > 60
    assert TOKENIZER.decode(batch["labels"][0][batch["labels"][0] >= 0]) == "red" * 20 + "<|end|>"


def test_the_loss_of_a_batch_is_the_models(clips):
    model, processor = model_and_processor(entry("whisper", "plits"), dtype=torch.float64)
    batch = Collator(processor)(several(clips))
    labels = batch.pop("labels")
    with torch.no_grad():
        got = model(**batch, labels=labels).loss
        log_probs = model(**batch).logits[:, :-1].log_softmax(-1)
    learned = labels[:, 1:] != -100
    assert not bool((labels[:, 1:][batch["input_ids"][:, 1:] == AUDIO_ID] != -100).any())
    want = -log_probs[learned].gather(-1, labels[:, 1:][learned][:, None]).mean()
    torch.testing.assert_close(got, want.float())  # transformers' losses are


def test_settings_that_are_refused():
    for value in (0, -1, True):
        with pytest.raises(ValueError, match="max_tokens must be a positive integer or None"):
            Collator(small_processor(), max_tokens=value)
