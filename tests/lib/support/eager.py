"""Attention as eager PyTorch computes it in a dtype: the peer whose error in 16 bits bounds the kernels'."""

import torch
from torch import Tensor

from palkernels import reference
from palkernels.testing import LalCase


def attention(case: LalCase) -> tuple[Tensor, Tensor]:
    """Return output and LSE of a case: both products in its dtype, the softmax in float32 (float64 for float64).

    So eager attention does in Hugging Face models. Differentiable by autograd.
    """
    query, key, value, audio_key, audio_value = case.tensors
    options = dict(case.options)
    scale, softcap = options.pop("scale", query.shape[-1] ** -0.5), options.pop("softcap", None)
    if (index := options.pop("audio_index", None)) is not None:
        audio_key, audio_value = audio_key[index.long()], audio_value[index.long()]
        if (lengths := options.get("audio_lengths")) is not None:
            options["audio_lengths"] = lengths[index.long()]
    sizes = query.shape[0], query.shape[2], key.shape[2], audio_key.shape[2]
    seen = reference.lal_mask(*sizes, **options, device=query.device)
    used, sees = seen.any(dim=1)[:, None, :, None], seen.any(dim=2)[:, None, :, None]

    def expanded(audio: Tensor, text: Tensor) -> Tensor:
        both = torch.cat([audio, text], dim=2).masked_fill(~used, 0)
        return both.repeat_interleave(query.shape[1] // key.shape[1], dim=1)

    scores = query.masked_fill(~sees, 0) @ expanded(audio_key, key).transpose(2, 3)
    scores = scores.to(torch.promote_types(query.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen.unsqueeze(1), float("-inf"))
    peak = scores.detach().amax(dim=-1, keepdim=True).masked_fill(~sees, 0)
    weights = torch.exp(scores - peak)
    total = weights.sum(dim=-1, keepdim=True).masked_fill(~sees, 1)
    out = (weights / total).to(query.dtype) @ expanded(audio_value, value)
    return out, (peak + torch.log(total)).masked_fill(~sees, float("-inf")).squeeze(-1)
