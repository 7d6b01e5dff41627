"""PalConfig: what it writes and reads, and settings that it refuses."""

import json

import pytest
from support.audio_llm import TOKENIZER, entry, text_config
from transformers import AutoConfig

from palkernels.model import PalConfig
from palkernels.model.connectors.base import Connector
from palkernels.model.connectors.registry import CONNECTORS


def config_of(*entries, **settings):
    return PalConfig(text_config=text_config(), encoders=list(entries), **({"audio_token_id": 2} | settings))


def test_config_round_trip(tmp_path):
    config = config_of(
        entry(["sslam", "clap"], "plits", "lfst"), entry("whisper"), layers=(0, 2), rope="none", projection="per_layer"
    )
    assert config.layers == [0, 2]
    again = PalConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert config.get_text_config().vocab_size == len(TOKENIZER)
    short = config_of({"type": "clap", "connector": {"type": "mlp"}}).encoders[0]
    assert short == {"type": "clap", "config": {}, "integration": "lal", "connector": {"type": "mlp", "config": {}}}


def test_special_tokens_are_those_of_the_language_model():
    config = config_of(entry("sslam"))
    assert config.pad_token_id == config.text_config.pad_token_id == TOKENIZER.pad_token_id
    assert config.eos_token_id == config.text_config.eos_token_id
    config.eos_token_id = 5
    assert config.text_config.eos_token_id == 5
    assert not {"pad_token_id", "bos_token_id", "eos_token_id"} & set(config.to_dict())
    again = PalConfig.from_dict(json.loads(config.to_json_string()))
    assert (again.pad_token_id, again.eos_token_id) == (config.pad_token_id, 5)


def test_a_connector_says_which_towers_it_fuses(monkeypatch):
    class Pair(Connector):
        tower_types = ("clap", "whisper")

    monkeypatch.setitem(CONNECTORS, "pair", Pair)
    pair = {"connector": {"type": "pair"}}
    (described,) = config_of({"type": ["clap", "whisper"], **pair}).encoders
    assert described["type"] == ["clap", "whisper"]
    assert described["config"] == [{}, {}]
    for wrong in ("clap", ["whisper", "clap"], ["clap"], ["sslam", "clap"]):
        with pytest.raises(ValueError, match=r"the type must be \['clap', 'whisper'\] for the connector 'pair'"):
            config_of({"type": wrong, **pair})


WRONG = [
    ((), {}, "encoders must be a list of at least one entry"),
    (("clap",), {}, "an entry of encoders must be a dict, got str"),
    (({"type": "clap"},), {}, 'must have the keys "type" and "connector", and may have .*, got no \'connector\'$'),
    ((entry("clap") | {"kind": 1},), {}, "an entry of encoders must have the keys .*, got 'kind'$"),
    ((entry("clap") | {"type": "beats"},), {}, 'an encoder\'s type must be "whisper", "clap" or "sslam", got'),
    ((entry("clap") | {"integration": "x"},), {}, "integration must be"),
    ((entry("clap") | {"connector": {"type": "cnn"}},), {}, "a connector's type must be"),
    ((entry("clap") | {"connector": "mlp"},), {}, "connector must be a dict"),
    ((entry("sslam") | {"connector": {"type": "lfst"}},), {}, r"the type must be \['sslam', 'clap'\] for"),
    ((entry(["sslam", "clap"], "lal", "lfst") | {"connector": {"type": "mlp"}},), {}, "the type must be one encoder's"),
    ((entry(["sslam", "clap"], "lal", "lfst") | {"config": {"hidden_size": 8}},), {}, "an encoder's config must be"),
    ((entry("clap") | {"config": {"freeze": True}},), {}, "an encoder's config must not say freeze"),
    ((entry("clap") | {"connector": {"type": "mlp", "config": {"hidden_size": 8}}},), {}, "hidden_size must be the"),
    ((entry("clap"),), {"layers": [3]}, "layers must be from 0 to 2"),
    ((entry("clap", "plits"),), {"layers": [0]}, r'layers must be "all" where no audio enters by LAL, got \[0\]'),
    ((entry("clap", "flamingo"),), {"layers": []}, r'layers must be "all" where no audio enters by LAL, got \[\]'),
    ((entry("clap"),), {"layers": "some"}, 'layers must be "all" or layer indices'),
    ((entry("clap"),), {"rope": "x"}, 'rope must be "sequence" or "none"'),
    ((entry("clap"),), {"impl": "x"}, "impl must be one of"),
    ((entry("clap"),), {"projection": "x"}, "projection must be"),
    ((entry("clap", "plits"),), {"projection": "per_layer"}, 'projection must be "shared" where no audio'),
    ((entry("clap", "plits"),), {"summary_tokens": 2}, "summary_tokens must be 0 unless one encoder"),
    ((entry("clap"),), {"summary_tokens": -1}, "summary_tokens must be an integer, at least 0"),
    ((entry("clap", "plits"),), {"audio_token_id": None}, "audio_token_id must be given where audio enters by PLITS"),
    ((entry("clap"),), {"audio_token_id": 259}, "audio_token_id must be from 0 to 258, got 259"),
    ((entry("clap"), entry("sslam", "flamingo")), {}, "audio must enter by LAL or by Flamingo, besides PLITS, got"),
    ((entry("clap"),), {"flamingo": {"every": 2}}, "flamingo must be a dict where audio enters by it, else None"),
    ((entry("clap"),), {"freeze_ffn": 1}, "freeze_ffn must be a bool"),
    ((entry("clap"),), {"encoder_batch": 0}, "encoder_batch must be an integer, at least 1, got 0"),
    ((entry("clap"),), {"encoder_batch": 2.0}, "encoder_batch must be an integer, at least 1, got 2.0"),
    ((entry("clap"),), {"text_config": {"hidden_size": 8}}, "text_config must have a model_type"),
    ((entry("clap"),), {"text_config": None}, "text_config must be a config or a dict"),
]  # fmt: skip


@pytest.mark.parametrize(("entries", "settings", "message"), WRONG, ids=range(len(WRONG)))
def test_configs_that_do_not_fit_are_refused(entries, settings, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        PalConfig(**{"text_config": text_config(), "encoders": list(entries), "audio_token_id": 2, **settings})
    assert "\n" not in str(caught.value)
