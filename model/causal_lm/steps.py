"""What audio relies on in a model's ``forward`` and in the steps that ``generate`` prepares, tried before attaching."""

import inspect
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake
from transformers import DynamicCache, PreTrainedModel

from palkernels.model.causal_lm.caches import CACHE_KEYWORDS, cache_keyword, cache_of
from palkernels.model.causal_lm.texts import Texts

CACHED = 2  # tokens in the cache of the step that is tried, behind which stands one more
# What a forward's audio is worked out from, and what is written into its arguments.
FORWARD_KEYWORDS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


def why_not_stepped(model: PreTrainedModel) -> str | None:
    """Return what in a model's forward, or in a decoding step of its generate, is not where audio needs it, or None.

    A step is prepared as ``generate`` does it, with a cache that holds keys; no weight takes part.
    """
    forward = type(model).forward
    parameters = inspect.signature(forward).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters.values()):
        missing = [keyword for keyword in FORWARD_KEYWORDS if keyword not in parameters]
        if cache_keyword(forward) is None:
            missing.append(" or ".join(CACHE_KEYWORDS))
        if missing:
            return f"its forward takes no {', no '.join(missing)}"
    prepare: Any = type(model).prepare_inputs_for_generation
    keyword = cache_keyword(prepare)
    if keyword is None:
        return f"its generate prepares steps with no {' or '.join(CACHE_KEYWORDS)}"
    if is_fake(model.get_input_embeddings().weight):
        return None  # it never gets values, so no step of it is wrong
    return _why_step_differs(model, keyword)


def _why_step_differs(model: PreTrainedModel, keyword: str) -> str | None:
    """Return how the arguments of one cached step differ from what its texts are read from, or None."""
    device = model.device
    ids = torch.ones(1, CACHED + 1, dtype=torch.long, device=device)
    keys = torch.zeros(1, 1, CACHED, 1, device=device)
    cache = DynamicCache()
    cache.update(keys, keys, 0)
    prepared = type(model).prepare_inputs_for_generation(
        model,
        ids,
        next_sequence_length=1,
        **{keyword: cache},
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(CACHED + 1, device=device).unsqueeze(0),
        use_cache=True,
        is_first_iteration=False,
    )
    if cache_of(prepared) is not cache:
        names = " or ".join(CACHE_KEYWORDS)
        return f"a step of its generate does not keep its cache as {names}, but in {', '.join(prepared)}"
    try:
        texts = Texts.of(prepared)
    except ValueError as error:
        return f"a step of its generate cannot be read: {error}"
    if (texts.num_cached, texts.num_queries) != (CACHED, 1):
        return (
            f"a step of its generate with 1 token behind {CACHED} is prepared as {texts.num_queries} behind "
            f"{texts.num_cached}"
        )
    if getattr(texts.position_ids, "shape", None) != (1, 1):
        return "a step of its generate has no position_ids of its own (B, 1)"
    return None
