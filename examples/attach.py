"""Let a stock language model hear audio: one call of attach, then audio= in forward and generate.
The weights are random, so that nothing is downloaded: from_pretrained gives a model that has something to say."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from palkernels.model import AudioState, LalConfig, attach


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=100
    )
    model = LlamaForCausalLM(config).eval()
    text = torch.randint(3, 100, (1, 8))
    stock = model(text).logits

    handle = attach(model, LalConfig(layers=range(1, 4)))  # delayed LAL: the first layer sees no audio
    print(handle.report())
    print("without audio the logits are the stock model's, bit for bit:", torch.equal(model(text).logits, stock))

    # What a connector makes of an encoder's output: (clips, audio tokens, the model's hidden size).
    audio = AudioState(torch.randn(1, 50, 64))
    changed = (model(text, audio=audio).logits - stock).abs().max()
    print(f"50 audio tokens change the logits by up to {changed:.2f}, and add none to them: {len(text[0])} tokens")
    tokens = model.generate(text, audio=audio, max_new_tokens=5, do_sample=False, pad_token_id=0)
    print("generated:", tokens[0, 8:].tolist())

    handle.detach()
    print("after detach the model is a stock one again:", torch.equal(model(text).logits, stock))


if __name__ == "__main__":
    main()
