"""Language models from .gguf files."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import CHAT_TEMPLATE, END, language_model
from support.gguf_files import write_gguf
from support.towers import SMALL_TOWERS, equal
from transformers.utils import is_gguf_available

from palkernels.model import PalForConditionalGeneration, PalProcessor, build
from palkernels.model.building import language_models

ENTRY = {"type": "sslam", "config": SMALL_TOWERS["sslam"]}
needs_gguf = pytest.mark.skipif(not is_gguf_available(), reason="pip install gguf: it writes the files")
# By how matrices are stored: by how much of its largest value one may be off.
KINDS = {"F32": 0.0, "F16": 5e-4, "Q8_0": 5e-3, "Q4_1": 0.07}


@needs_gguf
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_weights_are_the_file_s(tmp_path: Path, kind: str, tied: bool) -> None:
    """Unpacked to float32, queries and keys in transformers' order."""
    llm = language_model(tied=tied)
    write_gguf(tmp_path / "llm.gguf", llm, kind)
    model, processor = build(tmp_path / "llm.gguf", [ENTRY])
    assert model.dtype == torch.float32
    state = model.language_model.state_dict()
    expected = llm.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        rows = state[name][: len(tensor)]
        assert (rows - tensor).abs().max() <= KINDS[kind] * tensor.abs().max(), name
    if kind == "F32":
        ids = processor("the hen")["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits[..., :259], llm(ids).logits)


@needs_gguf
def test_saved_and_loaded(tmp_path: Path) -> None:
    """A quantised file too leaves nothing of its quantisation, and nothing of this machine's folders."""
    write_gguf(tmp_path / "llm.gguf", language_model(), "Q8_0", CHAT_TEMPLATE)
    model, processor = build(tmp_path / "llm.gguf", [ENTRY], dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert processor.tokenizer.chat_template == CHAT_TEMPLATE
    assert processor.tokenizer.eos_token == processor.tokenizer.pad_token == END
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "config.json").read_text()
    assert "quantization" not in text
    assert str(tmp_path) not in text
    loaded = PalForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert equal(model.state_dict(), loaded.state_dict())
    again = PalProcessor.from_pretrained(tmp_path / "saved")
    for sentence in ("the hen, 12  and 345!", f"a{END}b", "é漢"):
        ids = processor.tokenizer(sentence).input_ids
        assert again.tokenizer(sentence).input_ids == ids
        assert again.tokenizer.decode(ids) == sentence


@needs_gguf
def test_a_damaged_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "llm.gguf", language_model())
    data = (tmp_path / "llm.gguf").read_bytes()
    for damaged in (b"", b"GGUF", data[:200], data[: len(data) // 2], b"XXXX" + data[4:]):
        (tmp_path / "bad.gguf").write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"^llm '.*bad\.gguf' must be a causal LM with its tokenizer, got "
        ) as caught:
            build(tmp_path / "bad.gguf", [ENTRY])
        assert len(str(caught.value).splitlines()) == 1


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llm.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(language_models, "is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match=r"must be read with gguf and accelerate: pip install gguf$"):
        build(tmp_path / "llm.gguf", [ENTRY])
