"""What a step computes and what not: rows through FFN and attention, encoders, caches; and what a request may be."""

import sys

import numpy as np
import pytest
import torch
from support.served import (
    AUDIO_ID,
    QUESTIONS,
    RATE,
    WIDTH,
    A,
    Question,
    ask,
    assert_same,
    engine,
    prompt_of,
    prompt_of_states,
    sound,
)
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from palkernels.model.vllm import decoder

TEXT = list(range(10, 60))


@pytest.fixture(scope="module")
def llm(directory):
    with engine(directory("lal"), enable_mm_embeds=True, max_model_len=1024) as started:
        yield started


@pytest.fixture(scope="module")
def model(llm):
    """The served model, as it is in this process."""
    return llm.llm_engine.model_executor.driver_worker.model_runner.model


def states(tokens, seed=0):
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def count_rows(module, seen):
    """Note in ``seen`` with how many rows a module is called."""

    def note(module, args, kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        seen.append(next(value.shape[0] for value in tensors if value.ndim == 2))

    return module.register_forward_pre_hook(note, with_kwargs=True)


def test_audio_rows_pass_no_query_no_attention_and_no_ffn(llm, model):
    """The prompt's step runs its text rows, and every other step one row."""
    layer = model.language_model.model.layers[1]
    seen = {name: [] for name in ("mlp", "self_attn.qkv_proj", "self_attn.attn", "self_attn.o_proj")}
    hooks = [count_rows(layer.get_submodule(name), rows) for name, rows in seen.items()]
    ask(llm, [prompt_of_states([TEXT[:20], states(300), TEXT[20:30], states(5, 1), TEXT[30:]])], new=3)
    for hook in hooks:
        hook.remove()
    made_in_vain = [305] if layer.self_attn.qkv_proj.weight.shape[0] != 2 * WIDTH else []  # packed, as on some CPUs
    assert seen.pop("self_attn.qkv_proj") == [*made_in_vain, len(TEXT), 1, 1]
    assert all(rows == [len(TEXT), 1, 1] for rows in seen.values())


def test_no_logits_of_audio_rows(llm, model, monkeypatch):
    seen, compute = [], model.compute_logits
    monkeypatch.setattr(model, "compute_logits", lambda hidden: (seen.append(len(hidden)), compute(hidden))[1])
    ask(llm, [prompt_of_states([TEXT[:3], states(200, 2), TEXT[3:9]])], new=2)
    assert seen == [1, 1]


def test_the_stock_decoder_runs_once_a_step_on_the_text_of_all_requests(llm, model):
    texts = [[states(70, seed), TEXT[: 5 + seed]] for seed in (3, 4)] + [[TEXT[:7]]]
    rows = []
    hook = count_rows(model.language_model.model.layers[0].mlp, rows)
    ask(llm, [prompt_of_states(parts) for parts in texts], new=2)
    hook.remove()
    assert rows == [8 + 9 + 7, 3]


def test_only_steps_with_audio_leave_the_stock_path(llm, monkeypatch):
    """The prompt's step does; those that decode run as any model's, and so do texts alone."""
    seen, runs = [], decoder.text_runs

    def counted(common, *args):
        seen.append(common.num_reqs)
        return runs(common, *args)

    monkeypatch.setattr(decoder, "text_runs", counted)
    ask(llm, [prompt_of_states([states(60, 5), TEXT[:4]])], new=6)
    assert seen == [1]
    ask(llm, [prompt_of_states([TEXT[:8]])], new=6)
    assert seen == [1]


def test_encoders_take_the_clips_of_a_step_together_and_a_clip_once(llm, model):
    tower = model.audio_tower[0]
    first, second = sound(1.1, 11), sound(3.1, 12)  # the second in two windows
    batches = []
    hook = tower.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    questions = [Question("<|AUDIO|> one?", (first,)), Question("a <|AUDIO|> two?", (second,))]
    ask(llm, [prompt_of(question) for question in questions], new=1)
    ask(llm, [prompt_of(Question("again: <|AUDIO|> three?", (first,)))], new=1)  # another place: no hit of its keys
    hook.remove()
    assert batches == [3]


def test_a_second_question_about_a_clip_finds_its_keys(llm, reference):
    clip = states(500, 20)
    (one,) = ask(llm, [prompt_of_states([clip, TEXT[:12]])])
    (two,) = ask(llm, [prompt_of_states([clip, TEXT[12:37]])])
    assert (one.num_cached_tokens, two.num_cached_tokens) == (0, 480)
    assert_same(one, reference("lal").answer_states([clip, TEXT[:12]]))
    assert_same(two, reference("lal").answer_states([clip, TEXT[12:37]]))


def test_states_given_directly(llm, reference):
    cases = [[states(1, 30), TEXT[:2]], [TEXT[:9], states(33, 31), TEXT[9:14], states(77, 32), TEXT[:1]], [TEXT[:20]]]
    for parts, output in zip(cases, ask(llm, [prompt_of_states(parts) for parts in cases]), strict=True):
        assert_same(output, reference("lal").answer_states(parts))


def test_log_probabilities_of_a_prompt_with_audio(llm, reference):
    """The token behind a clip follows from the text before it, as without vLLM."""
    parts = [TEXT[:6], states(40, 40), TEXT[6:11]]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=5)
    (output,) = llm.generate([prompt_of_states(parts)], params, use_tqdm=False)
    expected = reference("lal").foretell_states(parts)
    places = [*range(1, 6), *range(46, 51)]  # of the tokens that others foretell
    for row, (place, token) in enumerate(zip(places, TEXT[1:11], strict=True)):
        assert abs(output.prompt_logprobs[place][token].logprob - float(expected[row, token])) < 1e-4, place


def test_behind_a_clip_that_nothing_foretells_all_tokens_are_as_likely(llm, reference):
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    (output,) = llm.generate([prompt_of_states([states(40, 41), TEXT[:3]])], params, use_tqdm=False)
    tokens = reference("lal").model.config.text_config.vocab_size
    assert output.prompt_logprobs[40][TEXT[0]].logprob == pytest.approx(-np.log(tokens))
    expected = reference("lal").foretell_states([states(40, 41), TEXT[:3]])
    assert abs(output.prompt_logprobs[41][TEXT[1]].logprob - float(expected[0, TEXT[1]])) < 1e-4


def test_layers_are_known_by_what_they_do(llm, model, monkeypatch):
    """One that makes other keys is refused when its weights are loaded, and so is one built otherwise."""
    layer = model.language_model.model.layers[2]
    model.process_weights_after_loading()
    stock = layer.forward
    monkeypatch.setattr(layer, "forward", lambda positions, hidden, residual: stock(positions, hidden + 1, residual))
    with pytest.raises(ValueError, match="layer 2 must make its keys by input norm, projection"):
        model.process_weights_after_loading()
    monkeypatch.setattr(layer, "forward", lambda positions, hidden, residual: hidden)
    with pytest.raises(ValueError, match="layer 2 must be built as Llama's is"):
        model.process_weights_after_loading()
    monkeypatch.undo()
    assert len(ask(llm, [prompt_of(QUESTIONS["first"])], new=1)) == 1


SOUND = sound(0.5)
WRONG = {
    "go on behind its last clip": ({"prompt_token_ids": [5, AUDIO_ID]}, [SOUND]),
    "once for each clip, 1 in all, got 2": ({"prompt": f"{A} and {A}?"}, [SOUND]),
    "once for each clip, 1 in all, got 0": ({"prompt": "and?"}, [SOUND]),
    r"at most 1023 tokens, about 81\.\d+ s, so that max_model_len 1024": ({"prompt": f"{A}?"}, [sound(100)]),
    "at least one sample, got none": ({"prompt": f"{A}?"}, [SOUND[:0]]),
    "finite samples within": ({"prompt": f"{A}?"}, [np.where(np.arange(8000) == 77, np.nan, SOUND)]),
    r"one channel, got \(2, 8000\)": ({"prompt": f"{A}?"}, [np.stack([SOUND, SOUND])]),
    r"sampling rate of 1000 to 768000 Hz, got 10 Hz": ({"prompt": f"{A}?"}, [(SOUND[:50], 10)]),
    "[Aa]t most 4 audio": ({"prompt": f"{A * 5}?"}, [SOUND] * 5),
    "hidden dimension mismatch": ({"prompt": f"{A}?"}, [torch.zeros(3, WIDTH + 1)]),
    r"audio_embeds\[0\] must have 1 to 1023 tokens, got 0": ({"prompt": f"{A}?"}, [torch.zeros(0, WIDTH)]),
    r"audio_embeds\[0\] must be finite": ({"prompt": f"{A}?"}, [torch.full((3, WIDTH), torch.nan)]),
    "floats": ({"prompt": f"{A}?"}, [torch.zeros(3, WIDTH, dtype=torch.long)]),
    "mm_processor_kwargs must be empty": ({"prompt": f"{A}?", "mm_processor_kwargs": {"padding": True}}, [sound(0.4)]),
}


@pytest.mark.parametrize("message", WRONG, ids=lambda message: message.replace("\\", "")[:40])
def test_what_a_request_does_wrong_is_said(llm, message):
    prompt, clips = WRONG[message]
    clips = [clip if isinstance(clip, tuple | torch.Tensor) else (clip, RATE) for clip in clips]
    with pytest.raises((VLLMValidationError, ValueError), match=message):  # a server answers 400 to both
        ask(llm, [{**prompt, "multi_modal_data": {"audio": clips}}], new=1)
    assert len(ask(llm, [prompt_of(QUESTIONS["first"])], new=1)) == 1


def test_a_clip_of_another_rate_is_converted_as_by_hugging_face(llm, reference):
    question, rate = Question(f"{A}What is it?", (sound(0.7, rate=11_025),)), 11_025
    inputs = reference("lal").processor(question.text, list(question.clips), rate)
    (output,) = ask(llm, [prompt_of(question, rate)])
    assert_same(output, reference("lal").answer_inputs(inputs))


def test_a_clip_of_another_rate_is_refused_without_torchaudio(llm, monkeypatch):
    for name in ("torchaudio", "torchaudio.transforms"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(VLLMValidationError, match="resampling needs torchaudio"):
        ask(llm, [prompt_of(QUESTIONS["first"], rate=11_025)], new=1)
    assert len(ask(llm, [prompt_of(QUESTIONS["first"])], new=1)) == 1
