"""What a handle reports of each layer."""

from support.oracles import build

from palkernels.model import LalConfig, attach


def test_report_names_layers_and_reasons():
    model = build("llama")
    handle = attach(model, LalConfig(layers=(1, 2)))
    report = handle.report()
    assert [layer.audio for layer in report.layers] == [False, True, True]
    assert [layer.impl for layer in report.layers] == ["stock", "sdpa", "sdpa"]
    assert str(report).splitlines() == [
        "LlamaForCausalLM, rope='sequence'",
        "layer  audio  implementation  audio_kv",
        "    0  no     stock           none",
        "    1  yes    sdpa            fused",
        "    2  yes    sdpa            fused",
    ]
    handle.detach()
    assert {(layer.audio, layer.impl, layer.audio_kv) for layer in handle.report().layers} == {(False, "stock", "none")}
    model.train()
    report = attach(model, LalConfig(impl="triton")).report()
    assert {(layer.impl, layer.why_not_triton) for layer in report.layers} == {("triton", ())}


def test_report_says_why_triton_does_not_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    report = attach(build("llama"), LalConfig(impl="triton")).report()
    assert {layer.impl for layer in report.layers} == {"none"}
    assert "CUDA device" in report.layers[0].why_not_triton[0]
    assert "triton does not run: tensors must be on a CUDA device" in str(report)
