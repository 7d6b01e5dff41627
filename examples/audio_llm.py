"""Build a whole audio LLM around a language model, train it to tell two sounds apart, save it, load it and ask it.
PAL with two encoders: Whisper's tokens take the place of placeholders (PLITS), SSLAM's are keys and values (LAL)."""

import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from palkernels.model import AUDIO_TOKEN, PalForConditionalGeneration, PalProcessor, byte_tokenizer

RATE = 16_000  # Hz
WHISPER = {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 1, "encoder_ffn_dim": 64}
SSLAM = {"hidden_size": 64, "num_layers": 1, "num_heads": 1}
ENCODERS = [
    {"type": "whisper", "config": WHISPER, "integration": "plits", "connector": {"type": "mlp"}},
    {"type": "sslam", "config": SSLAM, "integration": "lal", "connector": {"type": "mlp"}},
]


def tone(hertz: float) -> Tensor:
    """A second of a tone, (samples,). The path of an audio file will do in its place."""
    return torch.sin(2 * torch.pi * hertz * torch.arange(RATE) / RATE)


def conversation(clip: Tensor, answer: str | None = None) -> list[dict[str, Any]]:
    question = [{"type": "audio", "audio": clip}, {"type": "text", "text": "What do you hear?"}]
    asked = [{"role": "user", "content": question}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


def main() -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()  # a token per byte; any tokenizer that has a token for audio will do
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        initializer_range=0.1,  # random weights learn faster so
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = PalForConditionalGeneration.from_parts(
        AutoModelForCausalLM.from_config(config),
        ENCODERS,
        audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO_TOKEN),
    )
    processor = PalProcessor.from_config(tokenizer, model.config)
    template = {"tokenize": True, "sampling_rate": RATE}

    sounds = {"A deep tone.": tone(200), "A high tone.": tone(3000)}
    asked = [conversation(clip) for clip in sounds.values()]
    prompts = processor.apply_chat_template(asked, add_generation_prompt=True, **template)
    plits, lal = prompts["audio_lengths"][0].tolist()
    print(f"a second of sound: {plits} tokens in place of placeholders, {lal} as keys and values alone")

    # With labels: the loss is the answers'.
    conversations = [conversation(clip, answer) for answer, clip in sounds.items()]
    answered = processor.apply_chat_template(conversations, output_labels=True, **template)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(41):
        loss = model(**answered).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {float(loss.detach()):.2f}")

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
        loaded = PalForConditionalGeneration.from_pretrained(directory).eval()
        processor = PalProcessor.from_pretrained(directory)
    prompts = processor.apply_chat_template(asked, add_generation_prompt=True, **template)
    tokens = loaded.generate(**prompts, max_new_tokens=12, do_sample=False)
    for wanted, row in zip(sounds, tokens[:, prompts["input_ids"].shape[1] :], strict=True):
        print(f"answer to {wanted!r}: {tokenizer.decode(row)!r}")


if __name__ == "__main__":
    main()
