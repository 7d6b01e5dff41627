"""What an attached model must compute, by stock models and a mask written out, one unpadded text at a time."""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from palkernels.model import AudioState

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.1,  # larger than usual, so that attention is far from uniform
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 12,
    "short_factor": [1.0] * 6, "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0], "partial_rotary_factor": 0.75,
}  # fmt: skip
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
GEMMA3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
STOCK_ATTENTION = {"gemma2": "eager"}  # transformers 5.17 lets it run on "sdpa", which drops its softcap
# Each name stands for a model type and for what its configuration has besides SIZES. Windows are smaller than texts.
FAMILIES = {
    "llama": ("llama", {}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN_ROPE}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "mistral-window": ("mistral", {"sliding_window": 4}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 4, "layer_types": GEMMA3_LAYERS}),
    "phi3": ("phi3", {"sliding_window": None, "rope_parameters": PARTIAL_ROPE}),
    "phi3-window": ("phi3", {"sliding_window": 4}),
}
# RoPE frequencies change beyond 12 positions, for a whole batch at once: only single texts can equal the oracle.
LENGTH_DEPENDENT = {
    "llama-dynamic": ("llama", {"rope_parameters": DYNAMIC_ROPE, "max_position_embeddings": 12}),
    "phi3-longrope": (
        "phi3", {"sliding_window": None, "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 12},
    ),
}  # fmt: skip


def build(family, dtype=torch.float32, seed=0, layers=3):
    """Return a stock model of a family of FAMILIES or LENGTH_DEPENDENT, with random weights."""
    torch.manual_seed(seed)
    model_type, changes = (FAMILIES | LENGTH_DEPENDENT)[family]
    if "layer_types" in changes:
        changes = changes | {"layer_types": changes["layer_types"][:layers]}
    config = AutoConfig.for_model(model_type, **(SIZES | changes | {"num_hidden_layers": layers}))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=STOCK_ATTENTION.get(model_type, "sdpa"))
    model = model.to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # initially constant: to forget one would change nothing
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@dataclass
class Row:
    """One text of a batch, and the audio that it reads."""

    ids: torch.Tensor  # (T,)
    states: list  # for each layer (n, d), n the audio's true length, or None
    insert_at: torch.Tensor  # (n,)
    embeds: torch.Tensor | None = None  # (T, d) instead of the embeddings of ids: PLITS tokens among them


def rows_of(ids, lengths, state: AudioState, num_layers):
    """Split a batch into its texts with their audio; ``ids`` is a list of 1-D tensors without padding."""
    rows = []
    for b, row_ids in enumerate(ids):
        a = b if state.index is None else int(state.index[b])
        n = state.num_tokens if state.lengths is None else int(state.lengths[a])
        insert_at = torch.zeros(n, dtype=torch.long)
        if state.insert_at is not None:
            insert_at = state.insert_at[b].long().reshape(-1).expand(state.num_tokens)[:n]
        states = [None if state.for_layer(i) is None else state.for_layer(i)[a, :n] for i in range(num_layers)]
        rows.append(Row(row_ids, states, insert_at))
    return rows


def oracle_logits(model, row: Row, layers, rope):
    """Return the logits (T, V) at the text that LAL must give, by the stock eager model.

    The model runs on [text before; audio; text after]. Before every layer the audio states are put back, and a mask is
    set that lets queries see audio in ``layers`` only, and text within the layer's window. With rope="none" positions
    count the text alone, and the audio has cosines of 1 and sines of 0.
    """
    model.set_attn_implementation("eager")
    n, text = row.insert_at.shape[0], row.ids.shape[0]
    is_audio = torch.zeros(n + text, dtype=torch.bool)
    is_audio[row.insert_at + torch.arange(n)] = True
    positions = torch.arange(n + text)
    text_position = (~is_audio).cumsum(0) - 1  # counts text tokens alone
    embedded = model.get_input_embeddings()(row.ids) if row.embeds is None else row.embeds
    hidden = torch.zeros(n + text, embedded.shape[-1], dtype=embedded.dtype).masked_scatter(
        ~is_audio[:, None], embedded
    )
    if rope == "none":
        positions = text_position.clamp(min=0)

    def before_layer(index, window):
        seen = positions_seen(is_audio, text_position, window)
        if index not in layers:
            seen = seen & ~is_audio

        def hook(module, args, kwargs):
            states, *rest = args
            if row.states[index] is not None and n:
                states = states.masked_scatter(is_audio[None, :, None], row.states[index])
            mask = torch.zeros(1, 1, *seen.shape, dtype=states.dtype)
            kwargs = kwargs | {"attention_mask": mask.masked_fill(~seen, torch.finfo(states.dtype).min)}
            if rope == "none":
                cos, sin = kwargs["position_embeddings"]
                audio = is_audio[None, :, None]
                kwargs["position_embeddings"] = cos.masked_fill(audio, 1.0), sin.masked_fill(audio, 0.0)
            return (states, *rest), kwargs

        return hook

    hooks = [
        layer.register_forward_pre_hook(before_layer(i, window_of(layer)), with_kwargs=True)
        for i, layer in enumerate(model.model.layers)
    ]
    try:
        mask = torch.ones(1, n + text, dtype=torch.long)
        out = model(inputs_embeds=hidden[None], attention_mask=mask, position_ids=positions[None], use_cache=False)
        return out.logits[0, ~is_audio]
    finally:
        for hook in hooks:
            hook.remove()


def window_of(layer):
    attention = layer.self_attn
    in_config = None if hasattr(attention.config, "layer_types") else getattr(attention.config, "sliding_window", None)
    return getattr(attention, "sliding_window", in_config)


def positions_seen(is_audio, text_position, window):
    """Return the causal mask (L, L), True where a query sees a key; a window counts text only.

    Audio sees itself even where a window hides it, so that the softmax of every query has a key.
    """
    order = torch.arange(len(text_position))
    seen = order[None, :] <= order[:, None]
    if window is not None:
        seen = seen & (is_audio[None, :] | (text_position[None, :] > text_position[:, None] - window))
    return seen | torch.eye(len(text_position), dtype=torch.bool)
