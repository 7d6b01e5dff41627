"""Cases whose audio has eight bits."""

import math
import random
from dataclasses import replace

import torch

from palkernels import quantize_audio_kv
from palkernels.arguments import Call
from palkernels.attention import checks, launches
from palkernels.dtypes import EIGHT_BITS
from palkernels.testing import LalCase, lal_case, unreachable

NAN = 0x7F  # as bits


def in_eight_bits(case: LalCase, *, poison: bool = False) -> LalCase:
    """The case with its audio in eight bits, and scales that differ from row to row and head to head.

    With ``poison`` what no query sees is NaN, and each tensor lies with odd strides among NaN.
    """
    query, key, value, audio_key, audio_value = case.tensors
    rows, heads = audio_key.shape[:2]
    spread = 4.0 ** torch.randint(-1, 2, (2, rows, heads, 1, 1), generator=torch.Generator().manual_seed(rows + heads))
    louder = [x.nan_to_num() * each.to(x) for x, each in zip((audio_key, audio_value), spread, strict=True)]
    *audio, key_scale, value_scale = quantize_audio_kv(*louder, audio_lengths=case.options.get("audio_lengths"))
    if poison:
        _, unseen = unreachable(case)
        audio = [among_nan(filled(x, unseen)) for x in audio]
        key_scale, value_scale = (among_nan(x) for x in (key_scale, value_scale))
    options = case.options | {"audio_key_scale": key_scale, "audio_value_scale": value_scale}
    return replace(case, tensors=(query, key, value, *audio), options=options)


def filled(audio, unseen):
    """NaN wherever ``unseen`` (A, N)."""
    return audio.view(torch.uint8).masked_fill(unseen[:, None, :, None], NAN).view(EIGHT_BITS)


def among_nan(tensor):
    """The tensor as every other column of a wider one that is NaN."""
    bits = tensor.view(torch.uint8) if tensor.dtype == EIGHT_BITS else tensor
    wide = bits.new_full((*bits.shape[:-1], 2 * bits.shape[-1] + 3), NAN if bits.dtype == torch.uint8 else math.nan)
    view = wide[..., 1:-2:2].copy_(bits)
    return view.view(EIGHT_BITS) if tensor.dtype == EIGHT_BITS else view


def random_case(seed: int, features: tuple[str, ...], **shape) -> LalCase:
    """A case of few queries, which decode, or of several, with audio in eight bits."""
    choose = random.Random(seed)
    group, kv_heads = choose.choice([(1, 2), (3, 2), (4, 1)])
    queries = choose.choice([1, 3, 11])
    shape = {
        "batch": 3,
        "heads": group * kv_heads,
        "kv_heads": kv_heads,
        "queries": queries,
        "keys": queries + choose.choice([0, 20]),
        "audio": choose.choice([0, 1, 40, 64, 71]),
        "dim": choose.choice([16, 20, 64]),
    } | shape
    rows = choose.choice([1, 4]) if "index" in features else None
    return lal_case(**shape, features=features, audio_rows=rows, seed=seed)


def run(launch, case: LalCase):
    """Output and LSE by the launch of one kernel, for which nothing but the options is made ready."""
    call = checks.prepared(Call(*case.tensors, **case.options))
    out, lse = launches.empty_outputs(call.query)
    launch(call, out, lse, None).run()
    return out, lse
