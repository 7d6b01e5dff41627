"""The byte tokenizer: one token per byte, and back."""

from palkernels.model import AUDIO_TOKEN, byte_tokenizer


def test_bytes_and_back() -> None:
    tokenizer = byte_tokenizer()
    text = "Grüße, 世界\n\t🎵"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer(f"a{AUDIO_TOKEN}b")["input_ids"][1] == tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
