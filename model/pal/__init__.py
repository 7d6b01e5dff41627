"""The whole audio LLM, by Hugging Face's conventions: config, model, processor. Importing it tells the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from palkernels.model.pal.configuration_pal import PalConfig
from palkernels.model.pal.modeling_pal import PalForConditionalGeneration
from palkernels.model.pal.processing_pal import PalProcessor

__all__ = ["PalConfig", "PalForConditionalGeneration", "PalProcessor"]

AutoConfig.register(PalConfig.model_type, PalConfig)
AutoModel.register(PalConfig, PalForConditionalGeneration)
AutoModelForMultimodalLM.register(PalConfig, PalForConditionalGeneration)
AutoProcessor.register(PalConfig, PalProcessor)
# Trainer's label smoothing shifts labels for the classes that are named here, and for no other.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[PalConfig.model_type] = PalForConditionalGeneration.__name__
