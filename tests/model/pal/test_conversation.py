"""Several questions on the same clips, in turn."""

import pytest
import torch
from support.audio_llm import AUDIO_TOKEN, build_pal, entry, open_gates, processor_of, tone
from support.samples import TEMPLATE
from transformers import GenerationConfig

from palkernels.model import Conversation
from palkernels.model.pal.conversation import NEEDED

ENTRIES = {
    "lal": ([entry("whisper")], {}),
    "plits": ([entry("whisper", "plits")], {}),
    "unified": ([entry("whisper")], {"summary_tokens": 3}),
    "flamingo": ([entry("sslam", "flamingo")], {"flamingo": {"every": 1}}),
}
GREEDY = {"max_new_tokens": 4, "do_sample": False}
CLIPS = [tone(), tone(300, 0.2)]
QUESTIONS = ["What is it?", "And then?", "Why?"]
# Writes an answer otherwise once a question follows, as templates do that leave out a model's thoughts.
REWRITING = TEMPLATE.replace("{{ m.content }}<|end|>", "{% if not loop.last %}said: {% endif %}{{ m.content }}<|end|>")


def model_of(name):
    entries, settings = ENTRIES[name]
    return open_gates(build_pal(*entries, dtype=torch.float64, **settings))


def conversation(model, template=TEMPLATE, **settings):
    return Conversation(model, processor_of(model, chat_template=template), CLIPS, sampling_rate=16_000, **settings)


def tapped(monkeypatch, model):
    """How many tokens each forward has, and how many clips each pass of an encoder."""
    tokens, clips = [], []
    model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(next(x for x in kwargs.values() if torch.is_tensor(x)).shape[1]),
        with_kwargs=True,
    )
    model.audio_tower[0].register_forward_pre_hook(lambda _, args: clips.append(len(args[0])))
    return tokens, clips


@pytest.mark.parametrize("name", ENTRIES)
@torch.no_grad()
def test_each_answer_is_that_to_the_whole_text(name, monkeypatch):
    """And a further question costs its own tokens, and no encoder."""
    model = model_of(name)
    talk = conversation(model)
    tokenizer = talk.processor.tokenizer
    tokens, clips = tapped(monkeypatch, model)
    heard = [{"type": "audio", "audio": clip} for clip in CLIPS]
    ids = behind = ""
    for number, question in enumerate(QUESTIONS):
        del tokens[:]
        said = talk.ask(question, **GREEDY)
        assert clips == [len(CLIPS)]
        ran = list(tokens)
        first = [{"role": "user", "content": [*heard, {"type": "text", "text": QUESTIONS[0]}]}]
        inputs = talk.processor.apply_chat_template(
            first, add_generation_prompt=True, tokenize=True, sampling_rate=16_000
        )
        if number == 0:
            ids = inputs["input_ids"]
        else:
            ids = torch.cat([ids, behind], dim=1)
            assert ran[0] == behind.shape[1] + 1  # the answer's last token has not run
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        want = model.generate(**inputs, **GREEDY, use_cache=False)[:, ids.shape[1] :]
        assert said == tokenizer.decode(want[0], skip_special_tokens=True)
        end = want[0, -1] == model.generation_config.eos_token_id
        ids = torch.cat([ids, want[:, :-1] if end else want], dim=1)
        if number + 1 < len(QUESTIONS):
            text = f"<|end|>[user]{QUESTIONS[number + 1]}[assistant]"
            behind = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        clips[1:] = []
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * len(QUESTIONS)


def test_a_template_that_rewrites_earlier_turns(monkeypatch):
    """The text runs anew, and no encoder."""
    model = model_of("lal")
    tokens, clips = tapped(monkeypatch, model)
    talk = conversation(model, REWRITING)
    for question in QUESTIONS[:2]:
        del tokens[:]
        said = talk.ask(question, **GREEDY)
    assert clips == [len(CLIPS)]
    inputs = talk.processor.apply_chat_template(
        talk.messages[:-1], add_generation_prompt=True, tokenize=True, sampling_rate=16_000
    )
    assert tokens[0] == inputs["input_ids"].shape[1]
    new = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert said == talk.processor.tokenizer.decode(new, skip_special_tokens=True)


def test_what_fails_is_not_part_of_it():
    """The next question is answered as if the one that failed had not been asked."""
    model = model_of("lal")
    talk, other = conversation(model), conversation(model)
    for one in (talk, other):
        one.ask(QUESTIONS[0], **GREEDY)

    class Broken:
        def put(self, tokens):
            raise KeyboardInterrupt

    with pytest.raises(ValueError, match=r"content must be"):
        talk.ask(f"{AUDIO_TOKEN}?", **GREEDY)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("Never?", streamer=Broken(), **GREEDY)
    assert talk.ask(QUESTIONS[1], **GREEDY) == other.ask(QUESTIONS[1], **GREEDY)
    assert talk.messages == other.messages


def test_texts_alone_and_one_answer():
    model = model_of("lal")
    talk = Conversation(model, processor_of(model, chat_template=TEMPLATE))
    assert isinstance(talk.ask("Hello?", **GREEDY), str)
    for name, value in (("num_beams", 2), ("num_return_sequences", 2), ("use_cache", False)):
        message = f"{name} must be {NEEDED[name]} in a conversation, got {value}"
        with pytest.raises(ValueError, match=message):
            talk.ask("And?", **GREEDY, **{name: value})
        with pytest.raises(ValueError, match=message):
            talk.ask("And?", generation_config=GenerationConfig(do_sample=True, **{name: value}))
    with pytest.raises(TypeError, match="clips must be a list of clips, got one str"):
        Conversation(model, talk.processor, "a.wav")


def test_what_the_model_would_do_by_itself():
    """Its own generation config may have beams, and no cache."""
    model = model_of("lal")
    want = [talk.ask(question, **GREEDY) for talk in [conversation(model)] for question in QUESTIONS]
    model.generation_config.use_cache, model.generation_config.num_beams = False, 2
    talk = conversation(model)
    assert [talk.ask(question, **GREEDY) for question in QUESTIONS] == want


def test_a_model_that_is_moved():
    """Its states are of another kind then: the clips are encoded anew."""
    model = model_of("lal")
    talk = conversation(model)
    talk.ask(QUESTIONS[0], **GREEDY)
    model.float()
    talk.ask(QUESTIONS[1], **GREEDY)
    talk.ask(QUESTIONS[2], **GREEDY)
    assert talk._heard["audio_features"].lal.states.dtype == torch.float32
