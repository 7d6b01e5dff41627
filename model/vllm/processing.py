"""From a request's clips to features and placeholders. What a request does wrong becomes a 400, which says what."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from torch import Tensor
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import AudioProcessorItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from palkernels.errors import one_line
from palkernels.model.audio.limits import AudioError
from palkernels.model.pal import PalConfig, PalProcessor
from palkernels.model.vllm.clips import (
    check_embeds,
    check_length,
    longest_seconds,
    read_clip,
    token_counts,
    window_counts,
)

__all__ = ["PalDummyInputs", "PalMultiModalProcessor", "PalProcessingInfo", "features_name"]

Made = TypeVar("Made")


def features_name(tower: int) -> str:
    """Return the name under which a tower's features reach the model."""
    return f"input_features_{tower}"


def refusing(make: Callable[..., Made], *args: Any) -> Made:
    """Return what a call makes, or refuse the request for the reason that it gives.

    Raises:
        VLLMValidationError: the call raises an AudioError, or this clip needs a package that is not installed.
    """
    try:
        return make(*args)
    except (AudioError, ModuleNotFoundError) as error:
        raise VLLMValidationError(one_line(error), parameter="audio") from error


class PalDataParser(MultiModalDataParser):  # type: ignore[misc]
    """Clips stay as they come, with their rates: this library's processor converts them, as it does without vLLM."""

    def __init__(self, info: "PalProcessingInfo") -> None:
        super().__init__(
            expected_hidden_size=info._get_expected_hidden_size(),
            allow_missing_mm_embeddings=info.allow_missing_mm_embeddings,
        )
        self.info = info

    def _parse_audio_data(self, data: Any) -> Any:
        if data is None:
            return None
        if self.is_embeddings(data):
            items = super()._parse_audio_data(data)
            refusing(check_embeds, self.info.get_hf_config(), items.get_all(), self.info.most_tokens)
            return items
        clips = data if isinstance(data, list) and not (data and isinstance(data[0], float)) else [data]
        rate = self.info.sampling_rate
        return AudioProcessorItems([None if clip is None else refusing(read_clip, clip, rate) for clip in clips])


class PalProcessingInfo(BaseProcessingInfo):  # type: ignore[misc]
    """What vLLM asks of a model's inputs."""

    def get_hf_config(self) -> PalConfig:
        return self.ctx.get_hf_config(PalConfig)  # type: ignore[no-any-return]

    def get_hf_processor(self, **kwargs: object) -> PalProcessor:
        return self.ctx.get_hf_processor(PalProcessor, **kwargs)  # type: ignore[no-any-return]

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"audio": None}

    def get_data_parser(self) -> MultiModalDataParser:
        return PalDataParser(self)

    @property
    def sampling_rate(self) -> int:
        """The rate, in Hz, of arrays that come without theirs."""
        return self.get_hf_processor().highest_rate

    @property
    def most_tokens(self) -> int:
        """The most audio tokens of a clip, behind which one token of text must fit."""
        return int(self.ctx.model_config.max_model_len) - 1

    @property
    def longest_samples(self) -> int:
        """The samples, at ``sampling_rate``, of the longest clip that is served."""
        seconds = longest_seconds(self.get_hf_processor(), self.most_tokens)
        return max(1, int(seconds * self.sampling_rate))

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        processor = self.get_hf_processor()
        samples, rate = self.longest_samples, self.sampling_rate
        lengths = processor.state_lengths(lambda own: max(1, samples * own // rate))
        return {"audio": token_counts(processor, lengths.unsqueeze(0))[0]}


class PalDummyInputs(BaseDummyInputsBuilder[PalProcessingInfo]):  # type: ignore[misc]
    """The longest clips that a request may hold, with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return str(self.info.get_hf_processor().audio_token) * mm_counts.get("audio", 0) + "."

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> Any:
        clips = self._get_dummy_audios(
            length=self.info.longest_samples, num_audios=mm_counts.get("audio", 0), overrides=mm_options.get("audio")
        )
        return {"audio": [clip.astype(np.float32) for clip in clips]}


class PalMultiModalProcessor(BaseMultiModalProcessor[PalProcessingInfo]):  # type: ignore[misc]
    """Waveforms to each tower's features, and the audio token to as many placeholders as the clip has tokens."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        if hf_kwargs:
            raise VLLMValidationError(
                f"mm_processor_kwargs must be empty for this model, got {sorted(hf_kwargs)}",
                parameter="mm_processor_kwargs",
            )
        processor = self.info.get_hf_processor()
        return refusing(self._features, processor, hf_data["audio"])

    def _features(self, processor: PalProcessor, clips: Sequence[tuple[Any, int]]) -> BatchFeature:
        """Return features by tower of the windows of all clips, their valid states, and how many windows each has."""
        for clip, rate in clips:
            check_length(processor, len(clip), rate, self.info.most_tokens)
        arrays = [{"array": clip, "sampling_rate": rate} for clip, rate in clips]
        features, lengths = processor.audio_features(arrays)
        dtype = self.info.ctx.model_config.dtype  # which towers compute in: half as much to send
        named: dict[str, Tensor] = {features_name(tower): made.to(dtype) for tower, made in enumerate(features)}
        return BatchFeature({**named, "audio_lengths": lengths, "audio_windows": window_counts(processor, lengths)})

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        if "audio_embeds" in hf_inputs:
            return {"audio_embeds": MultiModalFieldConfig.batched("audio")}
        if "audio_lengths" not in hf_inputs:
            return {}
        windows: Tensor = hf_inputs["audio_windows"]
        fields = {
            features_name(tower): MultiModalFieldConfig.flat_from_sizes("audio", counts)
            for tower, counts in enumerate(windows.unbind(1))
        }
        for name in ("audio_lengths", "audio_windows"):
            fields[name] = MultiModalFieldConfig.batched("audio", keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        processor, data = self.info.get_hf_processor(), out_mm_kwargs.get_data()
        if "audio_embeds" in data:
            summary = processor.summary_tokens
            counts = [len(states) + summary for states in data["audio_embeds"]]
        else:
            counts = token_counts(processor, data["audio_lengths"]) if "audio_lengths" in data else []
        token = processor.audio_token_id
        return [PromptReplacement("audio", [token], lambda item: [token] * counts[item])]

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process a request as vLLM does, after looking at its prompt.

        Raises:
            VLLMValidationError: clips and audio tokens do not match, or a clip is the prompt's end.
        """
        processor = self.info.get_hf_processor()
        token, name = processor.audio_token_id, processor.audio_token
        ids, clips = inputs.prompt, sum(inputs.mm_data_items.get_all_counts().values())
        if ids.count(token) != clips:
            raise VLLMValidationError(
                f"the prompt must hold {name} once for each clip, {clips} in all, got {ids.count(token)}",
                parameter="audio",
            )
        if clips and ids[-1] == token:
            raise VLLMValidationError(
                "the prompt must go on behind its last clip: no token follows from audio alone", parameter="audio"
            )
        return super().apply(inputs, timing_ctx)
