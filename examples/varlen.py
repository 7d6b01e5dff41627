"""Packed rows: texts and clips of any length lie one after another, without padding, as flash-attn has them.
Every row gives what it gives alone; padding them to the longest would compute and store more than twice as much."""

import torch

from palkernels import lal_attention, lal_attention_varlen

TEXTS, CLIPS = (7, 40, 12), (1500, 90, 300)  # tokens of each row
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


def main() -> None:
    torch.manual_seed(0)
    texts, clips = sum(TEXTS), sum(CLIPS)
    query = torch.randn(texts, HEADS, HEAD_DIM)  # (sum T, Hq, D)
    key, value = torch.randn(2, texts, KV_HEADS, HEAD_DIM)  # (sum T, Hkv, D)
    audio_key, audio_value = torch.randn(2, clips, KV_HEADS, HEAD_DIM)  # (sum N, Hkv, D)
    out = lal_attention_varlen(
        query,
        key,
        value,
        audio_key,
        audio_value,
        cu_seqlens=torch.tensor([0, *TEXTS]).cumsum(0),  # where each row begins, and the end
        cu_audio=torch.tensor([0, *CLIPS]).cumsum(0),
        max_seqlen=max(TEXTS),
        max_audio=max(CLIPS),
    )

    largest = 0.0
    parts = [x.split(TEXTS) for x in (query, key, value, out)], [x.split(CLIPS) for x in (audio_key, audio_value)]
    for *text, packed, one_key, one_value in zip(*parts[0], *parts[1], strict=True):
        tensors = [x.transpose(0, 1).unsqueeze(0) for x in (*text, one_key, one_value)]  # (1, H, tokens, D)
        alone = lal_attention(*tensors)[0].transpose(0, 1)
        largest = max(largest, float((packed - alone).abs().max()))
    print(f"{len(TEXTS)} rows, {texts} text and {clips} audio tokens, packed: {tuple(out.shape)}")
    print(f"largest difference from each row alone: {largest:.1e}")
    print(f"padded to the longest they would be {3 * max(TEXTS)} text and {3 * max(CLIPS)} audio tokens")


if __name__ == "__main__":
    main()
