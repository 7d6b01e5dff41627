"""What of vLLM's settings goes with an audio LLM. What does not is refused when the server starts, all at once."""

import logging
from collections.abc import Iterator
from typing import Any

from vllm import envs
from vllm.config import CUDAGraphMode, VllmConfig

from palkernels.model.pal import PalConfig

__all__ = ["check_settings", "choose_defaults", "must_count"]

logger = logging.getLogger(__name__)
PLAIN_CACHES = ("auto", "float16", "bfloat16")


def must_count(config: PalConfig) -> bool:
    """Return whether some layers take texts as if there were no audio, by their keys or by their positions."""
    hears = config.uses("lal")
    return hears and (len(config.lal_layers()) < config.text_config.num_hidden_layers or config.rope == "none")


def choose_defaults(vllm_config: VllmConfig) -> None:
    """Take another choice, and say so, where vLLM's default does not go with a model."""
    config = vllm_config.model_config.hf_config
    if not config.uses("lal"):
        return
    if must_count(config) and vllm_config.cache_config.enable_prefix_caching:
        logger.warning("Prefix caching is off: some layers of this model do not hear audio, or do not count it.")
        vllm_config.cache_config.enable_prefix_caching = False
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE:
        logger.warning("cudagraph_mode is PIECEWISE: a full graph would miss an audio token among decoding requests.")
    if compilation.cudagraph_mode in (None, CUDAGraphMode.FULL_AND_PIECEWISE):
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


def check_settings(vllm_config: VllmConfig) -> None:
    """Refuse what cannot be served.

    Raises:
        ValueError: some of the settings are such; the message has a line for each.
    """
    config = vllm_config.model_config.hf_config
    found = [*_of_model(config, vllm_config), *(_of_lal(config, vllm_config) if config.uses("lal") else ())]
    if found:
        raise ValueError("\n".join([f"this audio LLM must be served otherwise, {len(found)} found:", *found]))


def _of_model(config: PalConfig, vllm_config: VllmConfig) -> Iterator[str]:
    """Yield what no audio LLM is served with."""
    parallel = vllm_config.parallel_config
    if config.uses("flamingo"):
        yield "- integration must be lal or plits, got flamingo: use generate of palkernels.model"
    if parallel.pipeline_parallel_size > 1:
        size = parallel.pipeline_parallel_size
        yield f"- pipeline_parallel_size must be 1, got {size}: set tensor_parallel_size instead"
    if vllm_config.lora_config is not None:
        yield "- enable_lora must be off: merge adapters into the model (merge_and_unload) before it is saved"
    if vllm_config.speculative_config is not None:
        yield "- speculative_config must be unset: nobody drafts for an audio LLM"


def _of_lal(config: PalConfig, vllm_config: VllmConfig) -> Iterator[str]:
    """Yield what LAL does not go with, whose text rows run apart from the audio's."""
    parallel, scheduler, cache = vllm_config.parallel_config, vllm_config.scheduler_config, vllm_config.cache_config
    graphs: Any = vllm_config.compilation_config.cudagraph_mode or CUDAGraphMode.NONE
    tokens, sequences = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
    if tokens <= sequences:
        yield (
            f"- max_num_batched_tokens must be above max_num_seqs, got {tokens} and {sequences}: one audio token in a "
            "step with one token per request would pass for decoding"
        )
    if graphs.has_full_cudagraphs():
        yield (
            f"- cudagraph_mode must be PIECEWISE or NONE, got {graphs}: a step whose requests have a token "
            "each replays a full graph, also where one of them is audio"
        )
    if envs.VLLM_USE_BREAKABLE_CUDAGRAPH:
        yield "- VLLM_USE_BREAKABLE_CUDAGRAPH must be 0: such graphs replay without the audio"
    if parallel.use_ubatching:
        yield "- enable_dbo must be off, and ubatch_size at most 1: text rows are not cut into micro-batches"
    if parallel.data_parallel_size > 1 and vllm_config.model_config.is_moe:
        size = parallel.data_parallel_size
        yield (
            f"- data_parallel_size must be 1 for a mixture of experts, got {size}, as replicas would wait for each "
            "other's passes: start that many servers"
        )
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name) > 1:
            yield f"- {name} must be 1, got {getattr(parallel, name)}: set tensor_parallel_size instead"
    if vllm_config.kv_transfer_config is not None:
        yield "- kv_transfer_config must be unset: connectors save what passes the attention, which audio does not"
    if cache.cache_dtype not in PLAIN_CACHES:
        yield f"- kv_cache_dtype must be {', '.join(PLAIN_CACHES)}, got {cache.cache_dtype}: audio has no scales in it"
    kinds = sorted(set(getattr(config.text_config, "layer_types", None) or ()) - {"full_attention"})
    if kinds or vllm_config.model_config.get_sliding_window() is not None:
        got = ", ".join(kinds) or "a sliding window"
        yield f"- every layer must attend to the whole text, got {got}: LAL's audio is exempt from windows"
    if must_count(config):
        yield from _of_counting(vllm_config)


def _of_counting(vllm_config: VllmConfig) -> Iterator[str]:
    """Yield what does not go with layers that take texts as if there were no audio."""
    why = 'some layers do not hear the audio, or rope is "none"'
    if vllm_config.cache_config.enable_prefix_caching:
        yield f"- enable_prefix_caching must be off where {why}"
