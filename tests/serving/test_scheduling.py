"""However vLLM schedules: prompts in chunks, requests that are put off, several on a clip in a step, two processes."""

import pytest
import torch
from support.served import AUDIO_ID, QUESTIONS, WIDTH, ask, assert_same, engine, prompt_of, prompt_of_states
from vllm import SamplingParams

TEXT = torch.randint(3, 250, (200,), generator=torch.Generator().manual_seed(5)).tolist()
CLIPS = [torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(tokens)) for tokens in (300, 77, 33)]
CASES = [
    [CLIPS[0], TEXT[:12]],
    [TEXT[:40], CLIPS[1], TEXT[40:85], CLIPS[2], TEXT[85:130]],
    [TEXT[50:150]],
    [CLIPS[2], TEXT[:1]],
]


def assert_all(llm, reference, cases=CASES):
    outputs = ask(llm, [prompt_of_states(parts) for parts in cases])
    for parts, output in zip(cases, outputs, strict=True):
        assert_same(output, reference.answer_states(parts))


def metric(llm, name):
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


@pytest.mark.parametrize("name", ["lal", "delayed", "unrotated"])
def test_prompts_in_chunks(directory, reference, name):
    """Clips are cut anywhere, and a chunk may hold audio alone."""
    with engine(directory(name), enable_mm_embeds=True, max_num_batched_tokens=48, max_num_seqs=4) as llm:
        assert_all(llm, reference(name))


@pytest.mark.parametrize("name", ["lal", "delayed", "unrotated"])
def test_log_probabilities_of_prompts_in_chunks(directory, reference, name):
    """A token behind a clip follows from the text before the clip, in whichever step that ran."""
    cases = [[TEXT[:5], CLIPS[0], TEXT[5:12]], *CASES[1:3], [TEXT[60:64], CLIPS[2], CLIPS[1], TEXT[64:70]]]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=3)
    with engine(directory(name), enable_mm_embeds=True, max_num_batched_tokens=48, max_num_seqs=4) as llm:
        outputs = llm.generate([prompt_of_states(parts) for parts in cases], params, use_tqdm=False)
    for parts, output in zip(cases, outputs, strict=True):
        texts = [(place, token) for place, token in enumerate(output.prompt_token_ids) if token != AUDIO_ID]
        expected = reference(name).foretell_states(parts)
        for row, (place, token) in enumerate(texts[1:]):
            assert abs(output.prompt_logprobs[place][token].logprob - float(expected[row, token])) < 1e-4, place


@pytest.mark.parametrize("name", ["lal", "delayed", "unrotated"])
def test_requests_that_are_put_off_begin_again(directory, reference, name):
    with engine(directory(name), enable_mm_embeds=True, num_gpu_blocks_override=17, max_model_len=512) as llm:
        cases = [[CLIPS[2], TEXT[i : i + 90]] for i in range(4)]
        outputs = ask(llm, [prompt_of_states(parts) for parts in cases], new=40)
        assert metric(llm, "vllm:num_preemptions") > 0
        for parts, output in zip(cases, outputs, strict=True):
            assert_same(output, reference(name).answer_states(parts, new=40))


def test_requests_that_share_a_clip_in_one_step(directory, reference):
    """There are more runs of text than requests, and some read blocks that others fill in this very step."""
    with engine(directory("lal"), enable_mm_embeds=True, max_num_seqs=3) as llm:
        start = [TEXT[:40], CLIPS[1], TEXT[40:85], CLIPS[2], TEXT[85:125]]
        assert_all(llm, reference("lal"), [[*start, TEXT[:count]] for count in (9, 12, 5)])
        assert metric(llm, "vllm:prefix_cache_hits") > 0


def test_two_processes_with_half_of_the_heads_each(directory, reference, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with engine(directory("encoders"), tensor_parallel_size=2) as llm:
        keys = ("windows", "text", "two")
        for key, output in zip(keys, ask(llm, [prompt_of(QUESTIONS[key]) for key in keys]), strict=True):
            assert_same(output, reference("encoders").answer(QUESTIONS[key]))
