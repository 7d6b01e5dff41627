"""Towers and connectors as a config's parts: what passes a connector."""

import pytest
import torch
from support.audio_llm import AUDIO_TOKEN, INTEGRATIONS, batch_of, build_pal, entry, logits, open_gates, tone
from support.counting import count_reads

from palkernels.model.pal import parts

SHORT = [f"hear {AUDIO_TOKEN}: what?", f"{AUDIO_TOKEN} then"]


def clips():
    """Of 0.1 and 0.8 seconds."""
    return [tone(), tone(300, 0.8)]


def rows_seen(module, run):
    """How many states of a clip a module is given, of several encoders the first's."""
    counts = []

    def count(module, args):
        counts.append((args[0] if isinstance(args[0], torch.Tensor) else args[0][0]).shape[1])

    hook = module.register_forward_pre_hook(count)
    run()
    hook.remove()
    return counts


@pytest.mark.parametrize("kind", INTEGRATIONS)
def test_only_the_longest_clips_states_pass(kind, monkeypatch):
    """Connectors and every layer's projection work on as many states as the longest clip has; logits stay the same."""
    entries, settings = INTEGRATIONS[kind]
    model = open_gates(build_pal(*entries, dtype=torch.float64, **settings))
    batch = batch_of(model, SHORT, clips())
    longest = batch["audio_lengths"].amax(0).tolist()
    windows = [tower.features.num_states for tower in model.audio_tower]
    assert all(most < window / 2 for most, window in zip(longest, windows, strict=True) if window != 64)
    with torch.no_grad():
        for (_, firsts), connector in zip(
            parts.by_entry(model.config.encoders, longest), model.multi_modal_projector, strict=True
        ):
            assert rows_seen(connector, lambda: model(**batch)) == [firsts[0]]
        for projector in model.layer_projector.values():
            assert rows_seen(projector, lambda: model(**batch)) == longest[:1]
    cut = logits(model, batch)
    monkeypatch.setattr(parts, "cut_paddings", lambda states, lengths: list(states))
    torch.testing.assert_close(cut, logits(model, batch), rtol=1e-10, atol=1e-10)


def test_the_layers_keys_and_values_are_those_of_the_longest_clip():
    """LAL projects no padding beyond it, in forward and in generate."""
    model = build_pal(entry("whisper"), layers=[1])
    batch = batch_of(model, SHORT, clips())
    assert batch["audio_lengths"].tolist() == [[5], [40]]
    widths = []
    features = model.get_audio_features(batch["input_features"], batch["audio_lengths"])
    assert features.lal.states.shape[:2] == (2, 40)
    model.language_model.model.layers[1].self_attn.k_proj.register_forward_hook(
        lambda module, args, output: widths.append(args[0].shape[1])
    )
    logits(model, batch)
    model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert max(widths) <= 40


def test_lengths_are_read_once_for_all_encoders(monkeypatch):
    model = build_pal(entry("whisper", "plits"), entry("sslam"), entry("clap", "plits", "qformer"))
    batch = batch_of(model, SHORT, clips())
    with torch.no_grad():
        encoded = [tower(x) for tower, x in zip(model.audio_tower, batch["input_features"], strict=True)]
    lengths = batch["audio_lengths"].unbind(1)
    entries = model.config.encoders
    assert count_reads(lambda: parts.without_padding(entries, encoded, lengths), monkeypatch) == 1
    assert count_reads(lambda: parts.without_padding(entries, encoded, [None] * 3), monkeypatch) == 0


def test_compiled_encoding_keeps_shapes():
    """A whole graph, of the encoder's every state, gives what eager gives for valid ones."""
    model = build_pal(entry("sslam"))
    batch = batch_of(model, SHORT, clips())
    arguments = batch["input_features"], batch["audio_lengths"]
    with torch.no_grad():
        eager = model.get_audio_features(*arguments).lal
        whole = torch.compile(model.get_audio_features, fullgraph=True, backend="eager")(*arguments).lal
    assert (eager.states.shape[1], whole.states.shape[1]) == (40, 512)
    torch.testing.assert_close(whole.states[:, :40], eager.states)
