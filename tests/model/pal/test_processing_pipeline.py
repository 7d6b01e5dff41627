"""transformers' own pipeline over model and processor: what it writes is what generate writes."""

import pytest
import torch
from support.audio_llm import AUDIO_TOKEN, INTEGRATIONS, TOKENIZER, build_pal, processor_of, tone
from transformers import pipeline

NEW = {"max_new_tokens": 4, "do_sample": False}
WAYS = ("lal", "plits+lal", "summary")
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(scope="module", params=WAYS)
def parts(request):
    encoders, settings = INTEGRATIONS[request.param]
    model = build_pal(*encoders, **settings)
    processor = processor_of(model, chat_template=TEMPLATE)
    try:
        return model, processor, pipeline("any-to-any", model=model, processor=processor)
    except ImportError as error:  # transformers up to 5.17 at least makes no such pipeline without librosa
        if "librosa" not in str(error):
            raise
        pytest.skip("this version's pipeline asks for librosa")


def answers(model, batch):
    written = model.generate(**batch, **NEW)[:, batch["input_ids"].shape[1] :]
    return TOKENIZER.batch_decode(written, skip_special_tokens=True)


def test_text_and_audio(parts):
    model, processor, pipe = parts
    text, clip = f"hear {AUDIO_TOKEN}: what?", tone()
    want = answers(model, processor(text, clip, 16_000))
    for more in (
        {"audio": clip.numpy(), "sampling_rate": 16_000},
        {"audio": clip.numpy(), "processor_kwargs": {"audio_kwargs": {"sampling_rate": 16_000}}},
        {"audio": {"array": clip.numpy(), "sampling_rate": 16_000}},
    ):
        (found,) = pipe(text=text, return_full_text=False, generate_kwargs=dict(NEW), **more)
        assert [found["generated_text"]] == want
    texts, clips = [text, f"a{AUDIO_TOKEN}"], [clip.numpy(), tone(900, 0.05).numpy()]
    found = pipe(text=texts, audio=clips, sampling_rate=16_000, return_full_text=False, generate_kwargs=dict(NEW))
    assert [one["generated_text"] for one in found] == answers(model, processor(texts, clips, 16_000))


def test_conversations(parts):
    model, processor, pipe = parts
    clip = {"array": tone().numpy(), "sampling_rate": 16_000}
    asked = [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "audio", "audio": clip}]}]
    batch = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True)
    (found,) = pipe(text=asked, return_full_text=False, generate_kwargs=dict(NEW))
    assert [found["generated_text"]] == answers(model, batch)
    begun = [*asked, {"role": "assistant", "content": [{"type": "text", "text": "It"}]}]
    batch = processor.apply_chat_template(begun, continue_final_message=True, tokenize=True)
    assert TOKENIZER.decode(batch["input_ids"][0]).endswith("[assistant]It")
    (found,) = pipe(text=begun, return_full_text=False, generate_kwargs=dict(NEW))
    assert [found["generated_text"]] == answers(model, batch)
    several = pipe(text=[asked, begun], return_full_text=False, generate_kwargs=dict(NEW))
    assert [one["generated_text"] for (one,) in several][1] == found["generated_text"]


def test_audio_reaches_the_answer(parts):
    """The scores of two clips differ, so that equal answers above are answers to the clip."""
    model, processor, _ = parts
    scores = [model(**processor(AUDIO_TOKEN + "?", clip, 16_000)).logits for clip in (tone(), tone(3000))]
    assert not torch.allclose(*scores)
