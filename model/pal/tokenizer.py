"""A tokenizer that needs no file, and the token that stands in a text for a clip."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["AUDIO_TOKEN", "END_TOKEN", "PAD_TOKEN", "byte_tokenizer", "knows_token"]

AUDIO_TOKEN = "<|AUDIO|>"
PAD_TOKEN = "<|pad|>"
END_TOKEN = "<|end|>"


def byte_tokenizer() -> Any:
    """Return a tokenizer of bytes: one token per byte of UTF-8, and ``PAD_TOKEN``, ``END_TOKEN`` and ``AUDIO_TOKEN``.

    Its 259 tokens decode to the text they came from, in any language. It is for small models and examples; a trained
    language model brings its own tokenizer, to which ``add_tokens(..., special_tokens=True)`` adds ``AUDIO_TOKEN``.
    """
    special = [PAD_TOKEN, END_TOKEN, AUDIO_TOKEN]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *letters])}, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, pad_token=PAD_TOKEN, eos_token=END_TOKEN)
    tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_TOKEN]})
    return tokenizer


def knows_token(tokenizer: Any, token: str) -> bool:
    """Return whether a tokenizer has a token as one."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    return token_id is not None and token_id != tokenizer.unk_token_id
