"""Small language models and encoders as checkpoints on disk, from which an audio LLM is built."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from support.towers import clap_checkpoint, whisper_checkpoint

END = "</s>"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,  # GGUF quantises blocks of 32
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGED = ["he", "th"]
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"


def text_tokenizer(**settings: Any) -> Any:
    """A tokenizer of bytes, 'he' and 'th', as a language model brings one: without an audio token."""
    vocabulary = {token: i for i, token in enumerate([END, *LETTERS, *MERGED])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(pair) for pair in MERGED]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **{"eos_token": END, **settings})


def language_model(
    rows: int | None = None, tied: bool = True, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A Llama for that tokenizer, in evaluation mode; ``rows`` of its embeddings, by default one a token."""
    count = rows or len(text_tokenizer())
    config = LlamaConfig(
        **SIZES, vocab_size=count, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=0, **changes
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        torch.nn.init.normal_(model.get_input_embeddings().weight, 0.05, 0.3)  # whose mean is not 0
    return model


def llm_checkpoint(path: Path, tokenizer: Any = None, **settings: Any) -> Any:
    """Write a language model with its tokenizer, and return it."""
    model = language_model(**settings)
    model.save_pretrained(path)
    (tokenizer or text_tokenizer()).save_pretrained(path)
    return model


def three_checkpoints(folder: Path) -> Path:
    """Write a checkpoint of each part into a folder, which is returned: llm, whisper, clap."""
    llm_checkpoint(folder / "llm")
    whisper_checkpoint(folder / "whisper")
    clap_checkpoint(folder / "clap")
    return folder
