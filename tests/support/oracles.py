"""What an attached model must compute, stated with stock models and by hand. One text row at a time, unpadded."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from palkernels import reference
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
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama3-rope": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE, attention_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen2-window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
}


def build(family, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = FAMILIES[family]().to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # initialised to zero, where a forgotten bias would not show
            parameter.data.normal_(std=0.3)
    return model


@dataclass
class Row:
    """One text row and the audio it reads: states per layer, each (n, d), n the true length."""

    ids: torch.Tensor
    states: list
    insert_at: torch.Tensor  # (n,)


def rows_of(ids, lengths, state: AudioState, num_layers):
    """Split a batch into unpadded rows; ``ids`` is a list of 1-D tensors."""
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


def in_sequence_logits(model, row: Row, layers):
    """rope="sequence": the stock eager model on [text before; audio; text after], the audio rows put back before
    every layer, and hidden from the text in layers that take no audio. Logits (T, V) at the text."""
    model.set_attn_implementation("eager")
    width = model.config.hidden_size
    n, text = row.insert_at.shape[0], row.ids.shape[0]
    audio_at = row.insert_at + torch.arange(n)
    is_audio = torch.zeros(n + text, dtype=torch.bool)
    is_audio[audio_at] = True
    embedded = model.get_input_embeddings()(row.ids)
    hidden = torch.zeros(n + text, width, dtype=embedded.dtype)
    hidden = hidden.masked_scatter(~is_audio[:, None], embedded)

    def before_layer(index):
        def hook(module, args, kwargs):
            states, *rest = args
            if row.states[index] is not None and n:
                states = states.masked_scatter(is_audio[None, :, None], row.states[index])
            if index not in layers:
                mask = kwargs["attention_mask"]
                lowest = torch.finfo(mask.dtype).min
                kwargs = kwargs | {"attention_mask": mask.masked_fill(is_audio[None, None, None, :], lowest)}
            return (states, *rest), kwargs

        return hook

    hooks = [
        layer.register_forward_pre_hook(before_layer(i), with_kwargs=True) for i, layer in enumerate(model.model.layers)
    ]
    try:
        mask = torch.ones(1, n + text, dtype=torch.long)
        return model(inputs_embeds=hidden[None], attention_mask=mask, use_cache=False).logits[0, ~is_audio]
    finally:
        for hook in hooks:
            hook.remove()


def by_hand_logits(model, row: Row, layers, rope="none"):
    """Every layer written out over the reference attention; a sliding window counts text only. Logits (T, V)."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    decoder = model.model
    n, text = row.insert_at.shape[0], torch.arange(row.ids.shape[0])
    shifted = text + (row.insert_at[None, :] <= text[:, None]).sum(1)
    hidden = decoder.embed_tokens(row.ids)[None]
    cos, sin = decoder.rotary_emb(hidden, (shifted if rope == "sequence" else text)[None])
    audio_cos, audio_sin = decoder.rotary_emb(hidden, (row.insert_at + torch.arange(n))[None])
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn

        def heads(x, projection, dim=attention.head_dim):
            return projection(x).unflatten(-1, (-1, dim)).transpose(1, 2)

        x = layer.input_layernorm(hidden)
        query, key = apply_rotary_pos_emb(heads(x, attention.q_proj), heads(x, attention.k_proj), cos, sin)
        injected = index in layers
        states = row.states[index] if injected else hidden.new_zeros(0, hidden.shape[-1])
        audio = layer.input_layernorm(states)[None]
        audio_key = heads(audio, attention.k_proj)
        if rope == "sequence" and injected:
            audio_key, _ = apply_rotary_pos_emb(audio_key, audio_key, audio_cos, audio_sin)
        out = reference.lal_attention(
            query,
            key,
            heads(x, attention.v_proj),
            audio_key,
            heads(audio, attention.v_proj),
            audio_visible_from=row.insert_at[None, : audio.shape[1]],
            window=getattr(attention, "sliding_window", None),
        )
        hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(decoder.norm(hidden))[0]


def oracle(model, rope):
    """In the stock sequence a window counts audio too; LAL's counts text only, so windows are written out."""
    if rope == "none" or getattr(model.config, "use_sliding_window", False):
        return lambda model, row, layers: by_hand_logits(model, row, layers, rope)
    return in_sequence_logits
