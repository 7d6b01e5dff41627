"""Small audio LLMs around the models of oracles.py, sounds, and the batches that a processor makes of them."""

import math

import torch
from transformers import AutoConfig

from palkernels.model import AUDIO_TOKEN, PalConfig, PalForConditionalGeneration, PalProcessor, byte_tokenizer
from support.oracles import FAMILIES, SIZES, STOCK_ATTENTION

# Short settings of each encoder and connector.
TOWER_SETTINGS = {
    "whisper": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 1, "encoder_ffn_dim": 16},
    "clap": {"patch_embeds_hidden_size": 4, "depths": [1] * 4, "num_attention_heads": [1] * 4},
    "sslam": {"hidden_size": 16, "num_layers": 1, "num_heads": 1},
}
CONNECTOR_SETTINGS = {
    "mlp": {},
    "qformer": {"num_queries": 5, "num_layers": 1, "width": 16, "num_heads": 2, "dropout": 0.0},
    "lfst": {"width": 16, "num_heads": 2, "depth": 1},
}
LAYERS = 3
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # transformers computes norms in float32
TOKENIZER = byte_tokenizer()
# One clip, two, none.
TEXTS = [f"hear {AUDIO_TOKEN}: what?", f"{AUDIO_TOKEN} or {AUDIO_TOKEN}, then", "no sound"]
AUDIO_ID = TOKENIZER.convert_tokens_to_ids(AUDIO_TOKEN)


def entry(tower_type, integration="lal", connector="mlp"):
    """An entry of PalConfig's ``encoders``; ``tower_type`` is a name, or for LFST a list of two."""
    several = isinstance(tower_type, list)
    config = [TOWER_SETTINGS[name] for name in tower_type] if several else TOWER_SETTINGS[tower_type]
    settings = {"type": connector, "config": CONNECTOR_SETTINGS[connector]}
    return {"type": tower_type, "config": config, "integration": integration, "connector": settings}


# By name: entries whose audio enters in one way, or in two at once.
MIXED = {
    "lal": [entry("whisper")],
    "plits": [entry("whisper", "plits")],
    "plits+lal": [entry("whisper", "plits"), entry("sslam")],
    "plits+flamingo": [entry("whisper", "plits"), entry("sslam", "flamingo")],
    "lal+lal": [entry("clap", "lal", "qformer"), entry("whisper")],
}
# Every way for audio to enter: the entries of a config, and its other settings.
INTEGRATIONS = {
    "lal": ([entry("sslam")], {}),
    "plits": ([entry("sslam", "plits")], {}),
    "plits+lal": ([entry("whisper", "plits"), entry("sslam")], {}),
    "flamingo": ([entry("sslam", "flamingo")], {"flamingo": {"every": 1, "ffn_multiplier": 1}}),
    "lfst": ([entry(["sslam", "clap"], "lal", "lfst")], {}),
    "summary": ([entry("sslam")], {"summary_tokens": 2, "projection": "per_layer"}),
}


def text_config(family="llama", **changes):
    model_type, settings = FAMILIES[family]
    vocabulary = {"vocab_size": len(TOKENIZER), "pad_token_id": TOKENIZER.pad_token_id}
    config = AutoConfig.for_model(model_type, **(SIZES | settings | vocabulary | changes))
    config._attn_implementation = STOCK_ATTENTION.get(model_type, "sdpa")
    return config


def build_pal(*entries, family="llama", dtype=torch.float32, text=None, **settings):
    torch.manual_seed(0)
    config = PalConfig(
        text_config=text_config(family, **(text or {})),
        encoders=list(entries),
        **({"audio_token_id": AUDIO_ID} | settings),
    )
    return PalForConditionalGeneration(config).to(dtype).eval()


def open_gates(model):
    """Flamingo's gates begin at 0, where no audio passes."""
    for layer in model.gated_layer.values():
        layer.attention_gate.data.fill_(0.7)
        layer.ffn_gate.data.fill_(-0.4)
    return model


def build_mixed(name):
    """One of MIXED in float64, its gates open if it has any."""
    settings = {"flamingo": {"every": 2}} if "flamingo" in name else {}
    return open_gates(build_pal(*MIXED[name], dtype=torch.float64, **settings))


def processor_of(model, **settings):
    return PalProcessor.from_config(TOKENIZER, model.config, **settings)


def batch_of(model, texts=TEXTS, audio=None, **settings):
    """A batch of texts, by default of TEXTS with a clip for each of their audio tokens."""
    return dict(processor_of(model)(texts, three_clips() if audio is None else audio, 16_000, **settings))


def batch_of_two(model):
    """A batch of two texts with a clip each."""
    return batch_of(model, [f"hear {AUDIO_TOKEN}: what?", f"{AUDIO_TOKEN} then"], [tone(), tone(300)])


def labelled(batch):
    """A batch with labels at every token of the text: neither at padding nor at placeholders."""
    text = (batch["attention_mask"] != 0) & (batch["input_ids"] != AUDIO_ID)
    return batch | {"labels": batch["input_ids"].masked_fill(~text, -100)}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def three_clips():
    return [tone(), tone(300, 0.04), tone(700, 0.07)]


def tone(hertz=440.0, seconds=0.1, rate=16_000):
    """(samples,) of a decaying tone with an overtone."""
    time = torch.arange(round(seconds * rate)) / rate
    return (torch.sin(2 * math.pi * hertz * time) + 0.3 * torch.sin(4.4 * math.pi * hertz * time)) * torch.exp(-time)


def forbid_towers(model):
    """Let every encoder of a model raise where it is called."""

    def run(*args):
        raise AssertionError("a tower runs")

    for tower in model.audio_tower:
        tower.register_forward_pre_hook(run)
