"""Small language models as .gguf files, by the package gguf's own writer, laid out as llama.cpp's converter does it."""

from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

from support.checkpoints import END, LETTERS, MERGED

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in the order in which llama.cpp rotates them."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def tensors_of(model: Any) -> dict[str, Tensor]:
    """A Llama's weights by GGUF's names; a tied head is left out."""
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    config = model.config
    named = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    if not config.tie_word_embeddings:
        named["output.weight"] = state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        for ours, its in NAMES.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            if its in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if its == "attn_q" else config.num_key_value_heads
                weight = interleaved(weight, heads)
            named[f"blk.{layer}.{its}.weight"] = weight
    return named


def write_gguf(path: Path, model: Any, kind: str = "F32", chat_template: str | None = None) -> None:
    """Write a Llama with the tokenizer of checkpoints.py; ``kind`` is how its matrices are stored."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([END, *LETTERS, *MERGED])
    writer.add_token_types([3, *[1] * len(LETTERS), *[1] * len(MERGED)])
    writer.add_token_merges([" ".join(pair) for pair in MERGED])
    writer.add_bos_token_id(0)  # without one transformers 5.17 reads no tokenizer
    writer.add_eos_token_id(0)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    for name, tensor in tensors_of(model).items():
        values = tensor.numpy()
        quantised = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        if kind == "F16" and tensor.ndim == 2:
            writer.add_tensor(name, values.astype(numpy.float16))
        elif quantised == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
