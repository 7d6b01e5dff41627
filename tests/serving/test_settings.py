"""What cannot be served is refused by name before anything is loaded, all at once; defaults are chosen that can."""

import pytest
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs

from palkernels.model.vllm.settings import check_settings, choose_defaults


def settings_of(directory, **changes):
    arguments = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "max_num_seqs": 8}
    return EngineArgs(model=str(directory), **{**arguments, **changes}).create_engine_config()


@pytest.fixture(scope="module")
def settings(directory):
    """The settings of each model, as vLLM makes them."""
    return {name: settings_of(directory(name)) for name in ("lal", "plits", "delayed", "unrotated")}


# By what the message must say: where the setting is, its name and a value.
REFUSED = {
    "pipeline_parallel_size must be 1, got 2": ("parallel_config", "pipeline_parallel_size", 2),
    "enable_lora must be off": (None, "lora_config", object()),
    "speculative_config must be unset": (None, "speculative_config", object()),
    "max_num_batched_tokens must be above max_num_seqs, got 8 and 8": ("scheduler_config", "max_num_batched_tokens", 8),
    "cudagraph_mode must be PIECEWISE or NONE": (
        "compilation_config",
        "cudagraph_mode",
        CUDAGraphMode.FULL_DECODE_ONLY,
    ),
    "enable_dbo must be off": ("parallel_config", "enable_dbo", True),
    "prefill_context_parallel_size must be 1, got 2": ("parallel_config", "prefill_context_parallel_size", 2),
    "decode_context_parallel_size must be 1, got 2": ("parallel_config", "decode_context_parallel_size", 2),
    "kv_transfer_config must be unset": (None, "kv_transfer_config", object()),
    "kv_cache_dtype must be auto, float16, bfloat16, got fp8": ("cache_config", "cache_dtype", "fp8"),
}


def change(monkeypatch, settings, part, name, value):
    monkeypatch.setattr(settings if part is None else getattr(settings, part), name, value)


@pytest.mark.parametrize("message", REFUSED)
def test_each_is_refused_by_name(settings, monkeypatch, message):
    check_settings(settings["lal"])
    change(monkeypatch, settings["lal"], *REFUSED[message])
    with pytest.raises(ValueError, match=message):
        check_settings(settings["lal"])


def test_all_are_refused_at_once(settings, monkeypatch):
    for part, name, value in REFUSED.values():
        change(monkeypatch, settings["lal"], part, name, value)
    with pytest.raises(ValueError, match="must be served otherwise") as caught:
        check_settings(settings["lal"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + len(REFUSED)
    assert all(any(message in line for line in lines) for message in REFUSED)


def test_plits_alone_is_refused_less(settings, monkeypatch):
    """Its audio is text to the decoder: what LAL does not go with it does."""
    change(monkeypatch, settings["plits"], "compilation_config", "cudagraph_mode", CUDAGraphMode.FULL)
    change(monkeypatch, settings["plits"], "cache_config", "cache_dtype", "fp8")
    check_settings(settings["plits"])
    change(monkeypatch, settings["plits"], "parallel_config", "pipeline_parallel_size", 2)
    with pytest.raises(ValueError, match="pipeline_parallel_size"):
        check_settings(settings["plits"])


def test_breakable_graphs(settings, monkeypatch):
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(ValueError, match="VLLM_USE_BREAKABLE_CUDAGRAPH must be 0"):
        check_settings(settings["lal"])


def test_windows_and_experts(settings, monkeypatch):
    text = settings["lal"].model_config.hf_config.text_config
    monkeypatch.setattr(text, "layer_types", ["full_attention", "sliding_attention"] * 2, raising=False)
    with pytest.raises(ValueError, match="every layer must attend to the whole text, got sliding_attention"):
        check_settings(settings["lal"])
    monkeypatch.delattr(text, "layer_types")
    monkeypatch.setattr(type(settings["lal"].model_config), "is_moe", True)
    check_settings(settings["lal"])
    change(monkeypatch, settings["lal"], "parallel_config", "data_parallel_size", 2)
    with pytest.raises(ValueError, match="data_parallel_size must be 1 for a mixture of experts, got 2"):
        check_settings(settings["lal"])


@pytest.mark.parametrize("name", ["delayed", "unrotated"])
def test_where_texts_go_without_audio_nothing_is_shared(settings, monkeypatch, name):
    """By default vLLM would cache prefixes."""
    ours = settings[name]
    assert not ours.cache_config.enable_prefix_caching
    change(monkeypatch, ours, "cache_config", "enable_prefix_caching", True)
    with pytest.raises(ValueError, match="1 found:\n- enable_prefix_caching must be off"):
        check_settings(ours)


@pytest.mark.parametrize(
    ("name", "mode"), [("lal", "PIECEWISE"), ("delayed", "PIECEWISE"), ("plits", "FULL_AND_PIECEWISE")]
)
def test_decoding_is_captured_piecewise(settings, monkeypatch, name, mode):
    """A full graph is replayed for a step whose requests have a token each, and one of them may be audio."""
    ours = settings[name]
    change(monkeypatch, ours, "compilation_config", "cudagraph_mode", CUDAGraphMode.FULL_AND_PIECEWISE)
    choose_defaults(ours)
    assert ours.compilation_config.cudagraph_mode == CUDAGraphMode[mode]


def test_the_stock_settings_keep_prefix_caching(settings):
    assert settings["lal"].cache_config.enable_prefix_caching


def test_vllm_asks_before_it_starts(directory):
    with pytest.raises(Exception, match="max_num_batched_tokens must be above max_num_seqs"):
        settings_of(directory("lal"), max_num_batched_tokens=512, max_num_seqs=512)


def test_flamingo_is_not_served(directory):
    with pytest.raises(Exception, match="integration must be lal or plits, got flamingo"):
        settings_of(directory("flamingo"))
