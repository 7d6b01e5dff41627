"""Whisper's encoder in CTranslate2's format: every way of storing weights, and files that are none."""

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ctranslate2_files import model_bytes, quantised, variable, whisper_variables, write
from support.towers import clip
from torch import Tensor

from palkernels.model import WhisperTower

# By a quantisation's name: by how much of its largest value a weight may be off.
ERRORS = {
    "float32": 0.0,
    "float16": 5e-4,
    "bfloat16": 4e-3,
    "int8": 4e-3,  # half a step of 1/127
    "int8_float16": 4e-3,
    "int16": 7e-4,  # half a step of 1/1024, of values to a float32's precision
}


@pytest.fixture(scope="module")
def model(whisper: Any) -> Any:
    """A whole Whisper whose norms and biases do something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, weight in whisper.named_parameters():
            if name.endswith("bias") or "norm" in name:
                torch.nn.init.normal_(weight, 1.0 if name.endswith("weight") else 0.0, 0.2)
    return whisper


@pytest.fixture(scope="module")
def variables(model: Any) -> dict[str, Tensor]:
    return whisper_variables(model)


@pytest.mark.parametrize("kind", ERRORS)
def test_weights_are_the_model_s(tmp_path: Path, model: Any, variables: dict[str, Tensor], kind: str) -> None:
    tower = WhisperTower.from_checkpoint(write(tmp_path, model_bytes(quantised(variables, kind))))
    expected = model.model.encoder.state_dict()
    state = tower.encoder.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == torch.float32
        assert (state[name] - value).abs().max() <= ERRORS[kind] * value.abs().max(), name


def test_states_are_the_model_s(tmp_path: Path, model: Any, variables: dict[str, Tensor]) -> None:
    """So are the settings that the format does not name: the activation, and embeddings that are not scaled."""
    tower = WhisperTower.from_checkpoint(write(tmp_path, model_bytes(variables)))
    features, _ = tower.features([clip(20_000), clip(300)])
    with torch.no_grad():
        assert torch.equal(tower(features), model.model.encoder(features).last_hidden_state)
    again = WhisperTower(**tower.config)
    again.load_state_dict(tower.state_dict())
    assert torch.equal(again(features), tower(features))
    assert not any(weight.requires_grad for weight in tower.parameters())
    learning = WhisperTower.from_checkpoint(tmp_path, freeze=False).encoder
    assert all(weight.requires_grad for weight in learning.layers.parameters())


def test_equal_tensors_are_stored_once(tmp_path: Path, model: Any, variables: dict[str, Tensor]) -> None:
    """CTranslate2 names the second one an alias of the first."""
    first, second = "encoder/layer_0/ffn/layer_norm/beta", "encoder/layer_1/ffn/layer_norm/beta"
    fewer = {name: tensor for name, tensor in variables.items() if name != second}
    tower = WhisperTower.from_checkpoint(write(tmp_path, model_bytes(fewer, {second: first})))
    state = tower.encoder.state_dict()
    for layer in range(2):
        assert torch.equal(state[f"layers.{layer}.final_layer_norm.bias"], variables[first])


def test_safetensors_come_first(tmp_path: Path, model: Any, variables: dict[str, Tensor]) -> None:
    """A directory that transformers wrote is read as such, whatever else lies there."""
    model.save_pretrained(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"no model")
    state = WhisperTower.from_checkpoint(tmp_path).encoder.state_dict()
    assert torch.equal(state["conv1.weight"], model.model.encoder.conv1.weight)


def refusal(directory: Path, data: bytes) -> str:
    with pytest.raises(ValueError, match=r"^checkpoint .* must .*, got ") as caught:
        WhisperTower.from_checkpoint(write(directory, data))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_a_file_that_ends_early(tmp_path: Path, variables: dict[str, Tensor]) -> None:
    """Wherever it does, and not only in the encoder's part."""
    data = model_bytes(variables)
    for size in [0, 3, 4, 9, 30, *range(40, len(data), len(data) // 60), len(data) - 1]:
        assert f"an end of the file, after {size} bytes, amid " in refusal(tmp_path, data[:size])


def test_a_damaged_file_is_read_or_refused(tmp_path: Path, variables: dict[str, Tensor]) -> None:
    """Whatever one byte says: an error is one line, and of the checkpoint."""
    data = model_bytes(variables)
    starts = [0, *(data.index(name.encode()) - 2 for name in variables)]
    messages = []
    for place in (start + step for start in starts for step in range(0, 60, 7)):
        damaged = bytearray(data)
        damaged[place] ^= (1, 0x80, 0xFF)[place % 3]
        try:
            WhisperTower.from_checkpoint(write(tmp_path, bytes(damaged)))
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > len(starts)
    assert all(message.startswith(f"checkpoint {str(tmp_path)!r} must ") for message in messages)


BIAS = "encoder/layer_0/self_attention/linear_0/bias"
WEIGHT = "encoder/layer_0/self_attention/linear_0/weight"
LAYER = "encoder/layer_1/ffn/linear_1/weight"


def test_what_is_no_such_whisper(tmp_path: Path, variables: dict[str, Tensor]) -> None:
    def bytes_with(**changes: Tensor | None) -> bytes:
        changed = {**variables, **changes}
        return model_bytes({name: tensor for name, tensor in changed.items() if tensor is not None})

    whole = model_bytes(variables)
    for data, message in (
        (model_bytes(variables, version=5), "got version 5 of CTranslate2's format, not 6"),
        (model_bytes(variables, spec="TransformerSpec"), "got a 'TransformerSpec' of revision 3, not a 'WhisperSpec'"),
        (model_bytes(variables, revision=2), "got a 'WhisperSpec' of revision 2, not a 'WhisperSpec' of revision 3"),
        (whole + b"\0", "got 1 bytes beyond its end"),
        (bytes_with(**{"encoder/conv1/weight": None}), "got none where encoder/conv1/weight of rank 3 must be"),
        (bytes_with(**{"encoder/num_heads": torch.zeros(2)}), "got one of rank 1 where encoder/num_heads of rank 0"),
        (bytes_with(**{"encoder/num_heads": torch.tensor(5, dtype=torch.int16)}), "must describe a Whisper encoder"),
        (bytes_with(**{LAYER: None}), "got 1 missing, the first 'layers.1.fc2.weight'"),
        (bytes_with(**{"encoder/layer_0/alibi": torch.zeros(1)}), "1 unexpected, the first 'layer_0/alibi'"),
        (bytes_with(**{LAYER: torch.zeros(3, 3)}), "layers.1.fc2.weight with shape (32, 64) as its other tensors say"),
        (bytes_with(**{LAYER: torch.zeros(32, 64, dtype=torch.int8)}), "layers.1.fc2.weight as torch.float32, got"),
        (bytes_with(**{BIAS: torch.ones(96)}), f"{BIAS} with a bias of keys, which Whisper's do not have"),
        (bytes_with(**{WEIGHT: torch.ones(97, 32)}), "of shape (97, 32), no queries, keys and values"),
        (bytes_with(**{f"{LAYER}_scale": torch.ones(32)}), "that do not make up a quantised weight: torch.float32"),
        (model_bytes(variables, {"encoder/x": "encoder/nothing"}), "an alias 'encoder/x' of 'encoder/nothing'"),
        (model_bytes(variables, {"encoder/x": "decoder/embeddings/weight"}), "outside of what it belongs to"),
        (
            bytes_with(**{"encoder/position_encodings/encodings": torch.zeros(400, 32)}),
            "embed_positions.weight with shape (1500, 32)",
        ),
    ):
        assert message in refusal(tmp_path, data)


def test_scales_that_no_weight_has(tmp_path: Path, variables: dict[str, Tensor]) -> None:
    stored = quantised(variables, "int8")
    for scale, message in (
        (torch.ones(31), "int8 of shape (32, 64), torch.float32 of shape (31,)"),
        (torch.zeros(32), "a scale of layer_1/ffn/linear_1/weight that is zero or not finite"),
        (torch.full((32,), torch.nan), "a scale of layer_1/ffn/linear_1/weight that is zero or not finite"),
        (torch.ones(32, dtype=torch.int32), "torch.int32 of shape (32,)"),
    ):
        assert message in refusal(tmp_path, model_bytes({**stored, f"{LAYER}_scale": scale}))


def test_counts_that_a_file_cannot_hold(tmp_path: Path, variables: dict[str, Tensor]) -> None:
    """A few bytes that promise gigabytes are refused before any memory is taken."""
    head = model_bytes({})[:-8]  # without the numbers of variables and aliases

    def one(shape: tuple[int, ...], size: int, kind: int = 0, rank: int | None = None) -> bytes:
        name = variable("encoder/conv1/weight", torch.zeros(()))[:-10]  # without rank, type, size and value
        sizes = struct.pack(f"<B{len(shape)}I", len(shape) if rank is None else rank, *shape)
        return head + struct.pack("<I", 1) + name + sizes + struct.pack("<BI", kind, size)

    for data, message in (
        (head + struct.pack("<I", 2**32 - 1), "amid a variable's name"),
        (one((2**30 - 1,), 2**32 - 4), "amid the values of encoder/conv1/weight"),
        (one((2**31, 2**31), 0), "0 bytes for encoder/conv1/weight of shape (2147483648, 2147483648)"),
        (one((), 0, rank=9), "encoder/conv1/weight of rank 9"),
        (one((1,), 4, kind=6), "encoder/conv1/weight of type 6, which is none"),
        (head + struct.pack("<IH", 1, 2) + b"ab", "a variable's name that does not end with a zero"),
        (head + struct.pack("<IH", 1, 0), "a variable's name that does not end with a zero"),
        (head + struct.pack("<IH", 1, 3) + b"\xff\xff\0", "codec can't decode"),
        (head + struct.pack("<I", 2) + 2 * variable("x", torch.zeros(1)), "two variables 'x'"),
    ):
        assert message in refusal(tmp_path, data)
