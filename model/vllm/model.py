"""An audio LLM as vLLM calls it: encoders and connectors are this library's, the language model is vLLM's own."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from palkernels.model.pal import PalConfig
from palkernels.model.pal.clips import AudioFeatures, Clips, summaries
from palkernels.model.pal.encoding import Encoding
from palkernels.model.pal.parts import build_connectors, build_towers
from palkernels.model.pal.tokenizer import AUDIO_TOKEN
from palkernels.model.vllm.decoder import LalDecoder
from palkernels.model.vllm.processing import PalDummyInputs, PalMultiModalProcessor, PalProcessingInfo, features_name
from palkernels.model.vllm.settings import check_settings
from palkernels.model.vllm.states import pack, split_rows

__all__ = ["PalForConditionalGeneration"]


class PalForConditionalGeneration(Encoding, nn.Module, SupportsMultiModal):  # type: ignore[misc]
    """A saved :class:`palkernels.model.PalForConditionalGeneration`, served by vLLM.

    In every step vLLM calls ``embed_input_ids`` with the clips' rows that are scheduled, and then ``forward``. What the
    first learns of LAL's audio rows it keeps for the second.

    Raises:
        ValueError: the settings, or the language model, cannot be served.
    """

    language_model: Any
    _mark_tower_model: Any  # vLLM's own
    _mark_language_model: Any
    _embed_text_input_ids: Any

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return what stands for a clip where a chat template takes text alone."""
        return AUDIO_TOKEN if modality == "audio" else None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        check_settings(vllm_config)
        config: PalConfig = vllm_config.model_config.hf_config
        self.config = config
        self.mixed = config.uses("lal") and config.uses("plits")
        self.dtype = vllm_config.model_config.dtype
        text = config.text_config
        with self._mark_tower_model(vllm_config, "audio"):
            towers = build_towers(config)
            self.multi_modal_projector = nn.ModuleList(build_connectors(config, towers))
            self.audio_tower = nn.ModuleList(towers)
            projected = config.lal_layers() if config.projection == "per_layer" else []
            self.layer_projector = nn.ModuleDict(
                {str(layer): nn.Linear(text.hidden_size, text.hidden_size) for layer in projected}
            )
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=text.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        self.lal: LalDecoder | None = None
        if config.uses("lal"):
            self.lal = LalDecoder(self.language_model, config, self.layer_projector, vllm_config)
        self._heard: tuple[np.ndarray | None, Tensor | None] = None, None  # LAL's audio rows of the step, their states

    def embed_multimodal(self, **inputs: Any) -> list[Tensor]:
        """Return the rows (tokens, columns) of each clip, as :mod:`palkernels.model.vllm.states` says.

        Args:
            inputs: what the processor made of C clips, all of a step together: features by tower and ``audio_lengths``
                (C, towers); or ``audio_embeds``, a list of (tokens, d) or a tensor of them.
        """
        if "audio_embeds" in inputs:
            return self._of_embeds(inputs["audio_embeds"])
        if "audio_lengths" not in inputs:
            return []
        features = [inputs[features_name(tower)] for tower in range(len(self.audio_tower))]
        return pack(self.get_audio_features(features, inputs["audio_lengths"]), self.dtype)

    def _of_embeds(self, embeds: Any) -> list[Tensor]:
        """Return the rows of clips whose states come from a caller, who gives what a connector would make."""
        rows: list[Tensor] = []
        for states in embeds:
            clip = Clips(states.unsqueeze(0), torch.tensor([len(states)], device=states.device))
            if self.lal is None:
                rows += pack(AudioFeatures(plits=clip), self.dtype)
                continue
            count = self.config.summary_tokens
            rows += pack(AudioFeatures(lal=clip, plits=summaries(clip, count) if count else None), self.dtype)
        return rows

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Return the embeddings (n, d) of a step's rows with PLITS tokens in place, and keep LAL's for ``forward``."""
        embeds: Tensor = self._embed_text_input_ids(
            input_ids, self.language_model.embed_input_ids, is_multimodal=is_multimodal
        )
        self._heard = None, None
        if multimodal_embeddings is None or not len(multimodal_embeddings):
            return embeds
        assert is_multimodal is not None
        rows = torch.cat([*multimodal_embeddings])
        audio = is_multimodal.numpy(force=True).copy()  # vLLM keeps it on the CPU, and uses it again
        if self.lal is None:
            return _put(embeds, audio, rows)
        if self.mixed:
            audio, tokens, rows, plits = split_rows(rows, audio)
            embeds = _put(embeds, tokens, plits)
        if audio.any():
            self._heard = audio, rows
        return embeds

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Return the hidden states (N, d) of a step's rows."""
        (audio, states), self._heard = self._heard, (None, None)
        if self.lal is None:
            hidden: Tensor = self.language_model.model(input_ids, positions, None, inputs_embeds=inputs_embeds)
            return hidden
        return self.lal(input_ids, positions, inputs_embeds, audio, states)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return the logits of some rows."""
        return self.language_model.compute_logits(hidden_states)  # type: ignore[no-any-return]

    def process_weights_after_loading(self) -> None:
        """Look at what the layers do, once all weights are as they run.

        Raises:
            ValueError: a layer that hears audio makes its keys or values in another way.
        """
        if self.lal is not None:
            self.lal.check_layers()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a saved model's tensors, whose names are those of the parts."""
        return AutoWeightsLoader(self).load_weights(weights)  # type: ignore[no-any-return]


def _put(embeds: Tensor, places: np.ndarray, tokens: Tensor) -> Tensor:
    """Put tokens in the places of a step's rows that ``places`` (n,) says."""
    rows = torch.from_numpy(np.flatnonzero(places)).to(embeds.device)
    return embeds.index_copy_(0, rows, tokens.to(embeds))


MULTIMODAL_REGISTRY.register_processor(PalMultiModalProcessor, info=PalProcessingInfo, dummy_inputs=PalDummyInputs)(
    PalForConditionalGeneration
)
