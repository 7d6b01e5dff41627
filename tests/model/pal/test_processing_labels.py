"""Labels that a processor makes: final, so that whatever counts or smooths them outside the model counts text alone."""

import numpy
import pytest
import torch
from support.audio_llm import AUDIO_TOKEN, TOKENIZER, batch_of, build_pal, entry, processor_of, tone
from tokenizers.processors import TemplateProcessing
from transformers import Trainer, TrainingArguments

from palkernels.model import PalProcessor, byte_tokenizer

MARKS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% endif %}"
)
NO_MARKS = MARKS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
PARTS = NO_MARKS.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text or '<|AUDIO|>' }}{% endfor %}")
TEMPLATES = {"marks": MARKS, "no marks": NO_MARKS, "parts": PARTS}
BATCH = {"tokenize": True, "sampling_rate": 16_000, "output_labels": True}
# The encoders, the processor's other settings, and how many placeholders clips of 0.1, 0.04 and 0.02 s have.
WAYS = {
    "plits": ([entry("whisper", "plits")], {}, (5, 2, 1)),
    "lal": ([entry("whisper")], {}, (0, 0, 0)),
    "plits+lal": ([entry("whisper", "plits"), entry("sslam")], {}, (5, 2, 1)),
    "summary": ([entry("whisper")], {"summary_tokens": 2}, (2, 2, 2)),
}


def heard(text, *seconds):
    """A message with a text and clips behind it."""
    clips = [{"type": "audio", "audio": tone(seconds=length)} for length in seconds]
    return {"role": "user", "content": [{"type": "text", "text": text}, *clips]}


def said(text):
    return {"role": "assistant", "content": text}


# Several turns and clips; one turn; a clip in an answer.
CONVERSATIONS = [
    [heard("a", 0.1, 0.04), said("one"), heard("b"), said("zwö"), heard("c", 0.02), said("three")],
    [{"role": "system", "content": "s"}, heard("d"), said("four")],
    [heard("e", 0.04), {"role": "assistant", "content": [{"type": "text", "text": "f"}, heard("", 0.1)["content"][1]]}],
]


def rows_by_hand(kind):
    """What each conversation's ids and labels are, as pieces of text, learned or not."""
    a, b, c = (AUDIO_TOKEN * size for size in WAYS[kind][2])
    return [
        [
            *((f"[user]a{a}{b}[assistant]", 0), ("one<|end|>", 1), ("[user]b[assistant]", 0), ("zwö<|end|>", 1)),
            *((f"[user]c{c}[assistant]", 0), ("three<|end|>", 1)),
        ],
        [("[system]s[user]d[assistant]", 0), ("four<|end|>", 1)],
        [(f"[user]e{b}[assistant]", 0), ("f", 1), (a, 0), ("<|end|>", 1)],
    ]


def by_hand(rows, side):
    """Ids, attention mask and labels of such rows, padded on one side."""
    rows = [[(token, learned) for text, learned in row for token in TOKENIZER(text)["input_ids"]] for row in rows]
    longest = max(map(len, rows))
    padded = []
    for row in rows:
        padding = [(TOKENIZER.pad_token_id, None)] * (longest - len(row))
        padded.append(padding + row if side == "left" else row + padding)
    ids = torch.tensor([[token for token, _ in row] for row in padded])
    mask = torch.tensor([[learned is not None for _, learned in row] for row in padded]).long()
    labels = torch.tensor([[token if learned else -100 for token, learned in row] for row in padded])
    return ids, mask, labels


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", WAYS)
def test_labels_of_the_assistants_turns(kind, template, side):
    encoders, settings, _ = WAYS[kind]
    processor = PalProcessor(TOKENIZER, encoders, **settings, chat_template=TEMPLATES[template])
    ids, mask, labels = by_hand(rows_by_hand(kind), side)
    more = {"padding_side": side, "return_assistant_tokens_mask": True}
    got = processor.apply_chat_template(CONVERSATIONS, **BATCH, **more)
    assert torch.equal(got["input_ids"], ids)
    assert torch.equal(got["attention_mask"], mask)
    assert torch.equal(got["labels"], labels)
    assert torch.equal(got["assistant_masks"], (labels != -100).long())
    assert got["audio_index"].tolist() == [[0, 1, 2], [-1, -1, -1], [3, 4, -1]]
    prompt = processor.apply_chat_template(CONVERSATIONS, **BATCH, add_generation_prompt=True, padding_side=side)
    learned = [row[row != -100].tolist() for row in prompt["labels"]]
    assert learned == [row[row != -100].tolist() for row in labels]


def test_masks_are_the_tokenizers_own():
    """Of a conversation without audio."""
    conversation = [{"role": "user", "content": "hé"}, said("wörld"), {"role": "user", "content": "x"}, said("y")]
    want = TOKENIZER.apply_chat_template(
        conversation, chat_template=MARKS, return_assistant_tokens_mask=True, return_dict=True
    )
    processor = PalProcessor(TOKENIZER, [entry("sslam")])
    for template in (MARKS, NO_MARKS):
        got = processor.apply_chat_template(
            conversation,
            template,
            tokenize=True,
            return_assistant_tokens_mask=True,
            padding="max_length",
            max_length=60,
        )
        count = len(want["input_ids"])
        assert got["assistant_masks"].tolist() == [[0] * (60 - count) + want["assistant_masks"]]
        assert set(got) == {"input_ids", "attention_mask", "assistant_masks"}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", WAYS)
def test_labels_from_a_position(kind, side):
    encoders, settings, sizes = WAYS[kind]
    processor = PalProcessor(TOKENIZER, encoders, **settings)
    a, b, c = (AUDIO_TOKEN * size for size in sizes)
    asked = [f"ä{AUDIO_TOKEN}{AUDIO_TOKEN}?", "why?", "so "]
    texts = [asked[0] + "ünd", asked[1] + "no", f"{asked[2]}{AUDIO_TOKEN}, yes"]
    audio = [tone(), tone(seconds=0.04), tone(seconds=0.02)]
    rows = [[(f"ä{a}{b}?", 0), ("ünd", 1)], [("why?", 0), ("no", 1)], [("so ", 0), (c, 0), (", yes", 1)]]
    ids, mask, labels = by_hand(rows, side)
    got = processor(texts, audio, 16_000, labels_from=[len(text) for text in asked], padding_side=side)
    assert torch.equal(got["input_ids"], ids)
    assert torch.equal(got["attention_mask"], mask)
    assert torch.equal(got["labels"], labels)
    # All text but placeholders and each text's first token, which nothing foretells on whichever side padding is.
    everything = ids.masked_fill((mask == 0) | (ids == processor.audio_token_id), -100)
    everything[range(3), mask.argmax(dim=1)] = -100
    assert torch.equal(processor(texts, audio, 16_000, output_labels=True, padding_side=side)["labels"], everything)
    one = processor("abcd", labels_from=numpy.int64(2))["labels"]
    assert one.tolist() == [[-100, -100, *TOKENIZER("cd")["input_ids"]]]


def test_what_the_tokenizer_adds_is_learned_at_the_end_alone():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    ends = [("<s>", tokenizer.bos_token_id), (tokenizer.eos_token, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A <|end|>", special_tokens=ends)
    processor = PalProcessor(tokenizer, [entry("sslam")])
    got = processor(["abc", "a"], labels_from=[1, 0], padding_side="right")
    b, c, a = (tokenizer.convert_tokens_to_ids(letter) for letter in "bca")
    end = tokenizer.eos_token_id
    assert got["labels"].tolist() == [[-100, -100, b, c, end], [-100, a, end, -100, -100]]
    cut = processor("abcdef", labels_from=1, truncation=True, max_length=4)
    assert cut["labels"].tolist() == [[-100, -100, b, end]]


def test_what_cannot_be_learned_is_refused():
    processor = PalProcessor(TOKENIZER, [entry("sslam")])
    for labels_from in (9, -1, [1], [1, 2, 3], [1, 9], True, 0.5, [0.5, 1]):
        with pytest.raises(ValueError, match="labels_from must be a position in each of 2 texts, in characters, got"):
            processor(["ab", "abc"], labels_from=labels_from)
    asked = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match="must hold a turn of the assistant to learn, got none in number 1"):
        processor.apply_chat_template([CONVERSATIONS[1], asked], NO_MARKS, **BATCH)
    for more in ({"tokenize": False}, {"return_dict": False}):
        with pytest.raises(ValueError, match="tokenize and return_dict must be True for labels and masks"):
            processor.apply_chat_template(CONVERSATIONS[1], NO_MARKS, **{**BATCH, **more})
    with pytest.raises(ValueError, match="continue_final_message must be without generation prompt, labels and masks"):
        processor.apply_chat_template(CONVERSATIONS[1], NO_MARKS, **BATCH, continue_final_message=True)
    two = [{"role": "user", "content": "a"}, said("b"), {"role": "user", "content": "c"}, said("d")]
    forgets = NO_MARKS.replace("{{ m.content }}<|end|>", "{{ m.content if loop.last else '...' }}<|end|>")
    with pytest.raises(ValueError, match=r"chat_template must mark .* got another text up to message 1"):
        processor.apply_chat_template(two, forgets, **BATCH)
    begins = "{{ messages[0]['role'] + '' }}" + NO_MARKS
    with pytest.raises(ValueError, match=r"chat_template must mark .* for the first 0 messages") as caught:
        processor.apply_chat_template([said("b")], begins, **BATCH)
    assert "\n" not in str(caught.value)


def test_labels_among_the_options_of_a_template_call():
    processor = PalProcessor(TOKENIZER, [entry("sslam")], chat_template=MARKS)
    got = processor.apply_chat_template(CONVERSATIONS[1], tokenize=True, processor_kwargs={"output_labels": True})
    assert torch.equal(got["labels"], processor.apply_chat_template(CONVERSATIONS[1], **BATCH)["labels"])


@pytest.mark.parametrize("kind", ["plits", "lal"])
def test_the_trainers_loss_is_that_of_the_text(kind, tmp_path):
    """With accumulated steps of different lengths, and label smoothing: float64 over all that is learned."""
    model = build_pal(*WAYS[kind][0])
    processor = processor_of(model, chat_template=MARKS)
    samples = [[heard("q" * n, 0.1 * n), said("answer " * n)] for n in (1, 3, 2, 4)]

    def collate(samples):
        return dict(processor.apply_chat_template(samples, **BATCH, padding_side="right"))

    losses, smooth = [], []
    for conversation in samples:
        batch = collate([conversation])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logs = model(**batch).logits[0, :-1].double().log_softmax(-1)
        learned = labels != -100
        losses.append(-logs[learned, labels[learned]])
        smooth.append(-logs[learned].mean(dim=-1))
    nll, uniform = torch.cat(losses).mean(), torch.cat(smooth).mean()
    common = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    options = {"remove_unused_columns": False, "max_steps": 1, "learning_rate": 0.0, **common}
    for more, want in (
        ({"per_device_train_batch_size": 4}, nll),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, nll),
        ({"per_device_train_batch_size": 4, "label_smoothing_factor": 0.3}, 0.7 * nll + 0.3 * uniform),
    ):
        arguments = TrainingArguments(str(tmp_path), **options, **more)
        trainer = Trainer(model, arguments, train_dataset=samples, eval_dataset=samples, data_collator=collate)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(want.item(), rel=1e-4)
        if not more.get("label_smoothing_factor"):
            assert trainer.evaluate()["eval_loss"] == pytest.approx(nll.item(), rel=1e-4)


def test_a_batch_with_labels_trains_the_model():
    model = build_pal(*WAYS["plits+lal"][0])
    plain = batch_of(model, [f"hear {AUDIO_TOKEN}: yes", "no sound"], [tone()])
    batch = batch_of(model, [f"hear {AUDIO_TOKEN}: yes", "no sound"], [tone()], labels_from=[16, 3])
    assert set(batch) - set(plain) == {"labels"}
    assert torch.isfinite(model(**batch).loss)
