"""Audio keys and values that generate keeps in eight bits: attach(model, LalConfig(audio_kv_dtype="float8_e4m3fn"))."""

import pytest
import torch
from support.attached import audio_state, batch, texts
from support.audio_llm import build_pal, entry
from support.compiled import in_whole_graphs
from support.oracles import build

import palkernels
from palkernels.arguments import SCALES
from palkernels.dtypes import EIGHT_BITS
from palkernels.model import LalConfig, attach
from palkernels.model.causal_lm import attention, report, request

EIGHT = LalConfig(audio_kv_dtype="float8_e4m3fn")


def inputs(kind):
    _, padded, mask = batch(texts(), "left")
    return {"input_ids": padded, "attention_mask": mask, "audio": audio_state(kind, torch.float32)}


def generated(model, arguments, **options):
    """The tokens and logits of four steps."""
    options |= {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    result = model.generate(**arguments, **options)
    return result.sequences, torch.stack(result.logits)


@pytest.fixture
def calls(monkeypatch):
    """The dtypes of the audio that the layers attend to."""
    seen = []
    compute = attention.lal_attention

    def record(*args, **kwargs):
        seen.append((args[3].dtype, args[4].dtype, *(name in kwargs for name in SCALES)))
        return compute(*args, **kwargs)

    monkeypatch.setattr(attention, "lal_attention", record)
    return seen


def rounded(key, value, *, audio_lengths=None):
    """What eight bits make of K and V, in their own dtype."""
    *quantized, key_scale, value_scale = palkernels.quantize_audio_kv(key, value, audio_lengths=audio_lengths)
    return tuple(
        x.to(key.dtype) * scale[:, :, None, None] for x, scale in zip(quantized, (key_scale, value_scale), strict=True)
    )


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "lengths"), ("qwen3", "two clips"), ("gemma2", "shared, inserted")]
)
@torch.no_grad()
def test_generation(family, kind, calls, monkeypatch):
    """Prompt and steps attend to eight bits, made once for each layer, and compute what rounded K and V give."""
    made = []
    quantize = request.quantize_audio_kv
    monkeypatch.setattr(
        request, "quantize_audio_kv", lambda *args, **options: made.append(1) or quantize(*args, **options)
    )
    model = build(family)
    attach(model, EIGHT)
    tokens, logits = generated(model, inputs(kind))
    assert set(calls) == {(EIGHT_BITS, EIGHT_BITS, True, True)}
    assert len(calls) == 3 * 4
    assert len(made) == 3
    monkeypatch.setattr(request, "quantize_audio_kv", rounded)
    want_tokens, want = generated(model, inputs(kind))
    assert torch.equal(tokens, want_tokens)
    assert (logits - want).abs().max() <= 1e-4 * want.abs().max()


@torch.no_grad()
def test_it_is_near_what_is_not_rounded():
    """Off by more than float32's rounding, and by less than a tenth of what the logits are."""
    results = []
    for config in (LalConfig(), EIGHT):
        model = build("llama")
        attach(model, config)
        results.append(generated(model, inputs("prefix"))[1][0])
    plain, eight = results
    assert 1e-5 < ((eight - plain).norm() / plain.norm()).item() < 0.1


def test_forwards_and_training_are_as_ever(calls):
    """Nothing is kept, so nothing is rounded: the same loss and gradients."""
    results = []
    for config in (LalConfig(), EIGHT, LalConfig(audio_kv_dtype="float8_e4m3fn", recompute_audio_kv=True)):
        model = build("llama").train()
        attach(model, config)
        arguments = inputs("lengths")
        loss = model(**arguments, labels=arguments["input_ids"]).loss
        loss.backward()
        with torch.no_grad():
            logits = model.eval()(**arguments).logits
        results.append([loss, logits, *(x.grad for x in model.parameters() if x.grad is not None)])
    for others in results[1:]:
        for got, want in zip(others, results[0], strict=True):
            assert torch.allclose(got, want, rtol=0, atol=1e-6)
    assert {dtype for dtype, *_ in calls} == {torch.float32}


@torch.no_grad()
def test_compiled_steps():
    """With a static cache each step is one graph, and gives the tokens of eager steps."""
    model = build("llama")
    attach(model, EIGHT)
    tokens, _ = generated(model, inputs("lengths"))
    graphs, static = in_whole_graphs()
    got, _ = generated(model, inputs("lengths"), **static)
    assert graphs
    assert torch.equal(got, tokens)


def test_it_is_saved(tmp_path):
    handle = attach(build("llama"), EIGHT)
    handle.save(tmp_path)
    assert attach(build("llama"), tmp_path).config == EIGHT


@torch.no_grad()
def test_an_audio_llm_has_it_too():
    pal = build_pal(entry("sslam"), audio_kv_dtype="float8_e4m3fn")
    assert pal.config.lal().audio_kv_dtype == "float8_e4m3fn"
    assert pal.config.to_dict()["audio_kv_dtype"] == "float8_e4m3fn"


@pytest.mark.parametrize("value", ["fp8", "float8_e5m2", torch.float8_e4m3fn, True])
def test_what_is_refused(value):
    with pytest.raises(ValueError, match='audio_kv_dtype must be None or "float8_e4m3fn", got'):
        LalConfig(audio_kv_dtype=value)


def test_the_report_says_where_triton_does_not_take_it(monkeypatch):
    from palkernels import devices

    monkeypatch.setattr(devices, "kernel_device", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (8, 0))
    monkeypatch.delenv("TRITON_INTERPRET")
    heads = (4, 2, 16, torch.float16, torch.device("cpu"), "auto")
    assert report.implementation(*heads) == ("triton", [])
    impl, (reason,) = report.implementation(*heads, in_eight_bits=True)
    assert impl == "sdpa"
    assert "compute capability 8.9" in reason
