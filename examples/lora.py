"""Train LoRA adapters and a connector on sounds that a language model must tell apart, save both, and load them again.
The encoder's states are made up: three kinds of noise around three directions, each to be answered by its number."""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from palkernels.model import EncodedAudio, LalConfig, MlpConnector, attach

KINDS, TOKENS, WIDTH = 3, 20, 32  # kinds of sound; audio tokens of a clip; width of the encoder's states
PROMPT = [5, 6, 7, 8]  # "which sound is it?"


def language_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)  # the same "pretrained" weights each time
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        initializer_range=0.1,  # random weights learn faster so
    )
    return Qwen2ForCausalLM(config)


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder states (B, TOKENS, WIDTH), texts (B, T) that end with the answer, and labels for the answer alone."""
    directions = torch.randn(KINDS, WIDTH, generator=torch.Generator().manual_seed(1))
    kind = torch.randint(KINDS, (size,), generator=generator)
    states = directions[kind].unsqueeze(1) + 0.5 * torch.randn(size, TOKENS, WIDTH, generator=generator)
    texts = torch.cat([torch.tensor([PROMPT]).expand(size, -1), kind.unsqueeze(1)], dim=1)
    labels = texts.clone()
    labels[:, : len(PROMPT)] = -100
    return states, texts, labels


def share_right(model: PeftModel, audio: EncodedAudio, texts: Tensor) -> float:
    with torch.no_grad():
        logits = model(texts[:, :-1], audio=audio).logits[:, -1]
    return float((logits.argmax(dim=-1) == texts[:, -1]).float().mean())


def main() -> None:
    base = language_model()
    attach(base, LalConfig(recompute_audio_kv=True), connector=MlpConnector(WIDTH, 64))
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    # peft freezes, and does not save, what it is not told of.
    lora = LoraConfig(r=8, target_modules=projections, modules_to_save=["palkernels_audio"], task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"trained: {sum(p.numel() for p in trained):,} parameters of adapters and connector")
    optimizer = torch.optim.AdamW(trained, lr=1e-2)

    generator = torch.Generator().manual_seed(0)
    for step in range(41):
        states, texts, labels = batch(16, generator)
        loss = model(texts, labels=labels, audio=EncodedAudio(states)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {float(loss.detach()):.2f}")

    model.eval()
    states, texts, _ = batch(64, generator)
    print(f"right: {share_right(model, EncodedAudio(states), texts):.0%} of new clips")

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)  # adapters and connector
        base = language_model()
        attach(base, LalConfig(), connector=MlpConnector(WIDTH, 64))
        again = PeftModel.from_pretrained(base, directory).eval()
    print(f"right after loading: {share_right(again, EncodedAudio(states), texts):.0%}")


if __name__ == "__main__":
    main()
