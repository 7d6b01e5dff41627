"""What is chosen for a device where the command line leaves it open."""

import pytest
import torch

from palkernels.bench import machine
from palkernels.bench.experiments.settings import CPU_SECONDS, Options, fit_time, reductions, settle

CPU = Options(device="cpu")


def test_a_cpu_runs_a_small_model_whole() -> None:
    settings = settle(CPU)
    assert settings.llm.name == "smollm2-135m"
    assert (settings.llm.layers, settings.llm.full_layers) == (30, 30)
    assert settings.batch == {"train": 2, "infer": 2}
    assert settings.audio_tokens == (128, 256, 512)
    assert [method.name for method in settings.methods] == ["plits", "lal"]
    text = reductions(CPU, settings)
    assert text.startswith("On a CPU the defaults are reduced: smollm2-135m instead of llama-3.2-1b, training batch 2 ")
    assert "at most 512 audio tokens instead of 1500" in text
    assert " layers" not in text
    assert settle(Options(device="cpu", model="smollm2-135m")).llm.layers == 30
    settle(Options(device="cpu", audio_tokens=(1500,), text_tokens=128, new_tokens=512))  # it has positions enough


def test_a_cpu_keeps_the_widths_and_says_what_it_cuts() -> None:
    options = Options(device="cpu", model="llama-3.2-1b")
    settings = settle(options)
    assert (settings.llm.layers, settings.llm.full_layers) == (2, 16)
    assert settings.llm.config.hidden_size == 2048
    assert settings.llm.config.vocab_size == 128256
    text = reductions(options, settings)
    assert text.startswith("On a CPU the defaults are reduced: 2 of 16 layers, training batch ")
    assert "8 new tokens instead of 32" in text


def test_what_is_given_is_taken() -> None:
    sizes = {"train_batch": 3, "infer_batch": 4, "new_tokens": 5, "repeats": 6, "audio_tokens": (7,)}
    options = Options(device="cpu", model="llama-3.2-1b", layers=16, dtype="fp16", **sizes)  # type: ignore[arg-type]
    settings = settle(options)
    assert settings.llm.layers == 16
    assert settings.batch == {"train": 3, "infer": 4}
    assert settings.new_tokens == 5
    assert settings.repeats == {"train": 6, "infer": 6}
    assert settings.dtype == torch.float16
    assert reductions(options, settings) == ""
    assert fit_time(options, settings, 10 * CPU_SECONDS) is settings


def test_dtype_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(machine, "cpu_has_bf16", lambda native=native: native)
        assert settle(CPU).dtype == dtype


def test_dtype_by_either_name() -> None:
    for name, dtype in (("fp32", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        assert settle(Options(device="cpu", dtype=name)).dtype == dtype


def test_a_slow_processor_gets_fewer_repeats() -> None:
    settings = settle(CPU)
    assert fit_time(CPU, settings, CPU_SECONDS) is settings
    assert fit_time(CPU, settings, CPU_SECONDS + 1).repeats == {"train": 1, "infer": 3}
    text = reductions(CPU, fit_time(CPU, settings, CPU_SECONDS + 1))
    assert "1 training and 3 inference repeats instead of 10" in text


def test_a_gpu_runs_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = settle(Options())
    assert settings.device.type == "cuda"
    assert settings.llm.name == "llama-3.2-1b"
    assert settings.audio_tokens == (128, 512, 1500)
    assert settings.llm.layers == 16
    assert settings.dtype == torch.bfloat16
    assert settings.batch == {"train": 8, "infer": 12}
    assert reductions(Options(), settings) == ""
