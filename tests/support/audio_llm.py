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
TOKENIZER = byte_tokenizer()
AUDIO_ID = TOKENIZER.convert_tokens_to_ids(AUDIO_TOKEN)


def entry(tower_type, integration="lal", connector="mlp"):
    """An entry of PalConfig's ``encoders``; ``tower_type`` is a name, or for LFST a list of two."""
    several = isinstance(tower_type, list)
    config = [TOWER_SETTINGS[name] for name in tower_type] if several else TOWER_SETTINGS[tower_type]
    settings = {"type": connector, "config": CONNECTOR_SETTINGS[connector]}
    return {"type": tower_type, "config": config, "integration": integration, "connector": settings}


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


def processor_of(model, **settings):
    return PalProcessor.from_config(TOKENIZER, model.config, **settings)


def tone(hertz=440.0, seconds=0.1, rate=16_000):
    """(samples,) of a decaying tone with an overtone."""
    time = torch.arange(round(seconds * rate)) / rate
    return (torch.sin(2 * math.pi * hertz * time) + 0.3 * torch.sin(4.4 * math.pi * hertz * time)) * torch.exp(-time)
