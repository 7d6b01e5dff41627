"""Audio LLMs in vLLM, by a plugin: vLLM itself stays as it is. docs/serving.md draws a step.

    versions      which releases of vLLM it is written for
    hooks         what vLLM asks when it reads a model's config, and its settings
    settings      what of vLLM's settings goes with LAL, and what is refused by name
    templates     chat templates that take content in parts, as OpenAI's requests have it
    processing    from a request's clips to features and placeholders, within limits
    model         PalForConditionalGeneration as vLLM calls it
    states        a clip's states as vLLM's encoder cache holds them
    decoder       a step: audio's keys and values to their slots, then the stock decoder on the text
    runs          runs of text rows, and the attention metadata for them alone
    foretelling   which hidden states the token behind audio follows from
    counting      how much audio each request has heard, where some layers must not count it
    projection    a layer's keys and values of audio

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` and calls it in each of its processes. Nothing
else in this library imports this room, and importing it alone imports no vLLM.
"""

__all__ = ["ARCHITECTURE", "register"]

ARCHITECTURE = "PalForConditionalGeneration"


def register() -> None:
    """Make saved audio LLMs known to vLLM: their model, and what their settings must be.

    Their config and processor are known by then: importing :mod:`palkernels.model` tells transformers' Auto classes.
    """
    import vllm

    from palkernels.model.vllm.versions import is_supported

    if not is_supported(vllm.__version__):  # other models must still be served: only loading this one raises
        vllm.ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.versions:{ARCHITECTURE}")
        return
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from palkernels.model.vllm.hooks import PalHooks

    vllm.ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = PalHooks
