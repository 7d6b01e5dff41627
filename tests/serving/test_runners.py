"""In bfloat16, compiled, as vLLM runs by default; and by its runner for GPUs, whose Triton kernels are interpreted."""

import os
import subprocess
import sys

import pytest
import torch
from support.served import QUESTIONS, RATE, Reference, ask, assert_same, engine, prompt_of

# vLLM's build for CPUs uses Triton where it finds a backend of that name. The interpreter needs none, so any will do.
BY_THE_RUNNER_OF_GPUS = """
import sys, types
from math import isfinite
from pathlib import Path
from triton.backends import backends
backends["cpu"] = types.SimpleNamespace(driver=types.SimpleNamespace(is_active=lambda: True), compiler=None)
from support.served import QUESTIONS, Reference, ask, assert_same, engine, prompt_of
from vllm import SamplingParams
directory = Path(sys.argv[1])
reference = Reference(directory)
with engine(directory, max_num_batched_tokens=48, max_num_seqs=4) as llm:
    assert llm.llm_engine.vllm_config.use_v2_model_runner
    for _ in range(2):
        outputs = ask(llm, [prompt_of(question) for question in QUESTIONS.values()], new=6)
        for question, output in zip(QUESTIONS.values(), outputs):
            assert_same(output, reference.answer(question, new=6))
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    (output,) = llm.generate([prompt_of(QUESTIONS["windows"])], params, use_tqdm=False)  # its clip takes two steps
    assert all(isfinite(entry.logprob) for entries in output.prompt_logprobs[1:] for entry in entries.values())
print("the same")
"""


@pytest.mark.parametrize("name", ["delayed", "encoders"])
def test_the_runner_of_gpus(directory, tmp_path, name):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-P", "-c", BY_THE_RUNNER_OF_GPUS, str(directory(name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.stdout.splitlines()[-1:] == ["the same"], done.stderr[-3000:]


def test_compiled(directory, reference):
    with engine(directory("lal"), enforce_eager=False) as llm:
        outputs = ask(llm, [prompt_of(question) for question in QUESTIONS.values()])
        for question, output in zip(QUESTIONS.values(), outputs, strict=True):
            assert_same(output, reference("lal").answer(question))


def test_bfloat16_is_as_exact_as_hugging_face_in_bfloat16(directory, reference):
    hugging_face = Reference(directory("encoders"))
    hugging_face.model.to(torch.bfloat16)
    with engine(directory("encoders"), dtype="bfloat16") as llm:
        outputs = ask(llm, [prompt_of(question) for question in QUESTIONS.values()], new=1)
    ours, its = [], []
    for question, output in zip(QUESTIONS.values(), outputs, strict=True):
        inputs = hugging_face.processor(question.text, list(question.clips) or None, RATE)
        exact, rounded = (model.answer_inputs(inputs, 1).logprobs[0] for model in (reference("encoders"), hugging_face))
        (logprobs,) = output.outputs[0].logprobs
        ours.append(max(abs(entry.logprob - float(exact[token])) for token, entry in logprobs.items()))
        its.append(float((rounded.float() - exact)[list(logprobs)].abs().max()))
    assert max(ours) <= 3 * max(its)
