"""The whole audio LLM: encoders, connectors and a language model that ``attach`` lets take audio."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init

from palkernels.model.causal_lm.attach import attach
from palkernels.model.causal_lm.attached import HANDLE
from palkernels.model.causal_lm.flamingo import FlamingoHandle, attach_flamingo
from palkernels.model.causal_lm.freezing import freeze_ffn
from palkernels.model.causal_lm.gated_layer import GatedLayer
from palkernels.model.causal_lm.handle import LalHandle
from palkernels.model.causal_lm.state import AudioState
from palkernels.model.causal_lm.support import base_model
from palkernels.model.connectors.base import Connector
from palkernels.model.pal.clips import Clips, join, places, rows_of, summaries
from palkernels.model.pal.configuration_pal import PalConfig
from palkernels.model.pal.parts import build_connectors, build_towers, connect, tower_types, with_configs

__all__ = ["AudioFeatures", "PalForConditionalGeneration"]

IGNORED = -100  # a label that the loss passes over


class AudioFeatures(NamedTuple):
    """Encoded clips, by the way in which they enter the language model; None where nothing enters so. Given as
    ``audio_features=`` instead of ``input_features``, clips are encoded once for several calls."""

    plits: Clips | None = None
    lal: Clips | None = None
    flamingo: Clips | None = None


class PalForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """An audio LLM with the interface of Hugging Face's (Qwen2-Audio, Voxtral).

    ``forward`` and ``generate`` take what :class:`PalProcessor` returns:

    - input_ids, attention_mask (B, T): texts, padded on either side in ``forward``, on the left in ``generate``. Every
      token that enters by PLITS has a placeholder ``config.audio_token_id`` there, in the order of the clips.
    - input_features: clips as the tower's ``features`` makes them, (C, ...), or a list of them, one per tower.
    - audio_lengths (C,) or (C, towers): the valid states of each clip; None: all.
    - audio_index (B, K): the clips of each text in their order, -1 where there is none; None: clip b belongs to text
      b, and C == B. Texts may share a clip.
    - insert_at (B,) or (B, K): where the audio of each clip that enters by LAL or Flamingo stands in the text, in
      tokens without padding, not decreasing; None: before the text. Placeholders count as text: with an ``insert_at``
      in front of a clip's placeholders they see its other audio. The paper leaves this open.

    In a sequence that continues a cache (B, T) are the new tokens. All clips of the conversation are given again, as
    ``audio_features`` if they are not to be encoded again, for LAL's audio lies in no text cache; PLITS tokens do, and
    are not looked at where ``input_ids`` has no placeholder. ``generate`` takes the whole conversation and its cache.

    Args:
        config: what it is built of.
        language_model, towers: modules to use instead of new ones with random weights; ``from_parts`` takes them.

    Raises:
        ValueError: ``attach`` refuses the language model.
    """

    config: PalConfig
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: PalConfig,
        language_model: PreTrainedModel | None = None,
        towers: Sequence[nn.Module | None] | None = None,
    ) -> None:
        super().__init__(config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.language_model = language_model
        self.audio_tower = nn.ModuleList(build_towers(config, towers))
        self.multi_modal_projector = nn.ModuleList(build_connectors(config, list(self.audio_tower)))
        width, layers = config.text_config.hidden_size, config.lal_layers()
        own = layers if config.projection == "per_layer" else []
        self.layer_projector = nn.ModuleDict({str(layer): nn.Linear(width, width) for layer in own})
        self.gated_layer = nn.ModuleDict()
        handle = self._attached()  # refuses a language model that cannot be attached
        if isinstance(handle, FlamingoHandle):
            self.gated_layer = handle.layers
        for part in (self.multi_modal_projector, self.layer_projector, self.gated_layer):
            _keep_weights(part)
        self._freeze()
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, from safetensors unless ``use_safetensors`` says otherwise. What the config says is frozen
        is so again, which loading forgets."""
        found = super().from_pretrained(*args, **{"use_safetensors": True, **kwargs})
        (found[0] if isinstance(found, tuple) else found)._freeze()
        return found

    @classmethod
    def from_parts(
        cls,
        language_model: PreTrainedModel,
        encoders: Sequence[dict[str, Any]],
        towers: Sequence[nn.Module | None] | None = None,
        **settings: Any,
    ) -> Self:
        """An audio LLM around a language model that is there already, which is used, not copied.

        Args:
            language_model: any causal LM that ``attach`` takes.
            encoders: :class:`PalConfig`'s entries. A tower that is given brings its ``config``.
            towers: one per encoder (of LFST's entry two), in their order; None: one with random weights. Those of
                ``TOWERS[...].from_checkpoint`` have trained ones.
            settings: the other arguments of PalConfig.

        Connectors have random weights. All parts get the language model's dtype and device.
        """
        encoders = with_configs(encoders, towers)
        config = PalConfig(text_config=language_model.config, encoders=encoders, **settings)
        model = cls(config, language_model, towers)
        model.generation_config = copy.deepcopy(language_model.generation_config)
        for part in (model.audio_tower, model.multi_modal_projector, model.layer_projector):
            part.to(device=language_model.device, dtype=language_model.dtype)
        return model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, of the whole model in safetensors.

        Raises:
            ValueError: it holds peft's adapters, among which weights have names that nothing would load.
        """
        if any(".base_layer." in name for name, _ in self.named_parameters()):
            raise ValueError("the model must hold no adapters to be saved: peft's merge_and_unload() merges them")
        return super().save_pretrained(*args, **kwargs)

    def _freeze(self) -> None:
        if self.config.freeze_encoders:
            self.audio_tower.requires_grad_(False)
        if self.config.freeze_ffn:
            freeze_ffn(self.language_model)

    def _init_weights(self, module: nn.Module) -> None:
        """Of what a checkpoint lacks."""
        super()._init_weights(module)
        if isinstance(module, Connector):  # its queries and the like, which are no module
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=0.02)
        elif isinstance(module, GatedLayer):
            init.zeros_(module.attention_gate)
            init.zeros_(module.ffn_gate)

    def _attached(self) -> LalHandle | FlamingoHandle | None:
        """The attached language model's handle; None where none of its layers takes audio."""
        if self.config.lal_layers():
            return attach(self.language_model, self.config.lal())
        if not self.config.uses("flamingo"):
            return None
        if self.gated_layer:
            handle: FlamingoHandle = getattr(base_model(self.language_model), HANDLE)
            return handle
        settings = {"impl": self.config.impl, **(self.config.flamingo or {})}
        return attach_flamingo(self.language_model, **settings)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()  # type: ignore[no-any-return]

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()  # type: ignore[no-any-return]

    def get_audio_features(
        self, input_features: Tensor | Sequence[Tensor], audio_lengths: Tensor | None = None
    ) -> AudioFeatures:
        """Clips through encoders and connectors; the arguments are ``forward``'s.

        Returns:
            AudioFeatures of tokens (C, N, d), N by encoder and connector, those of several encoders joined clip by
            clip.
        """
        features = [input_features] if isinstance(input_features, Tensor) else list(input_features)
        count = len(self.audio_tower)
        if len(features) != count:
            raise ValueError(f"input_features must hold a tensor for each of {count} towers, got {len(features)}")
        encoded = [tower(clips) for tower, clips in zip(self.audio_tower, features, strict=True)]
        if audio_lengths is not None:
            rows = encoded[0].shape[0]
            if audio_lengths.numel() != rows * count:
                got = tuple(audio_lengths.shape)
                raise ValueError(f"audio_lengths must be (C, towers) = {(rows, count)}, got {got}")
            audio_lengths = audio_lengths.reshape(rows, count).to(encoded[0].device)
        found: dict[str, list[Clips]] = {}
        first = 0
        for entry, connector in zip(self.config.encoders, self.multi_modal_projector, strict=True):
            last = first + len(tower_types(entry))
            lengths = None if audio_lengths is None else audio_lengths[:, first:last]
            clips = connect(cast(Connector, connector), encoded[first:last], lengths)
            found.setdefault(entry["integration"], []).append(clips)
            first = last
        if self.config.summary_tokens:
            found["plits"] = [summaries(found["lal"][0], self.config.summary_tokens)]
        return AudioFeatures(**{way: join(parts)[0] for way, parts in found.items()})

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | Sequence[Tensor] | None = None,
        audio_lengths: Tensor | None = None,
        audio_index: Tensor | None = None,
        insert_at: Tensor | None = None,
        audio_features: AudioFeatures | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """One forward of the language model; further keywords are its own.

        Args:
            labels: (B, T), -100 where there is none. Placeholders have none.
            position_ids: each text's own, without LAL's audio.

        Returns:
            The language model's output: loss, logits (B, T, vocabulary), past_key_values.
        """
        features = self._features(input_features, audio_lengths, audio_features)
        arguments = self._with_audio(input_ids, inputs_embeds, features, audio_index, insert_at, past_key_values)
        if "inputs_embeds" in arguments:
            arguments.pop("input_ids", None)
        found = None if input_ids is None else self._placeholders(input_ids)
        if labels is not None and found is not None:
            labels = labels.masked_fill(found, IGNORED)
        given = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "labels": labels,
            "use_cache": use_cache,
        }
        return self.language_model(**arguments, **{k: v for k, v in given.items() if v is not None}, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        input_ids: Tensor | None = None,
        input_features: Tensor | Sequence[Tensor] | None = None,
        audio_lengths: Tensor | None = None,
        audio_index: Tensor | None = None,
        insert_at: Tensor | None = None,
        audio_features: AudioFeatures | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's ``generate``, all its keywords included; the audio is encoded and projected once.

        Returns:
            What the language model's returns: tokens (B, prompt and new ones).
        """
        prompt = inputs if input_ids is None else input_ids
        features = self._features(input_features, audio_lengths, audio_features)
        arguments = self._with_audio(prompt, inputs_embeds, features, audio_index, insert_at, None)
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        base_model(self.language_model).generation_config = self.generation_config
        return self.language_model.generate(**arguments, **kwargs)

    def _features(
        self,
        input_features: Tensor | Sequence[Tensor] | None,
        audio_lengths: Tensor | None,
        audio_features: AudioFeatures | None,
    ) -> AudioFeatures | None:
        if input_features is None:
            return audio_features
        if audio_features is not None:
            raise ValueError("audio must be input_features or audio_features, got both")
        return self.get_audio_features(input_features, audio_lengths)

    def _with_audio(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        features: AudioFeatures | None,
        audio_index: Tensor | None,
        insert_at: Tensor | None,
        cache: Any,
    ) -> dict[str, Any]:
        """The language model's arguments: text, with PLITS tokens in their places, and LAL's audio."""
        arguments: dict[str, Any] = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        arguments = {name: given for name, given in arguments.items() if given is not None}
        if not arguments:
            raise ValueError("input_ids or inputs_embeds must be given, got neither")
        found = None if input_ids is None else self._placeholders(input_ids)
        if features is None or not any(features):
            if found is not None and not torch.compiler.is_compiling() and bool(found.any()):
                raise ValueError(f"audio must be given for {int(found.sum())} placeholders in input_ids, got none")
            return arguments
        batch = next(iter(arguments.values())).shape[0]
        clips = next(part for part in features if part is not None)
        index = _index(audio_index, batch, clips)
        if features.plits is not None:
            continued = cache is not None and cache.get_seq_length() > 0
            if found is None or inputs_embeds is not None:
                raise ValueError("input_ids must be given alone where audio enters by PLITS, got inputs_embeds")
            if not continued or bool(found.any()):
                arguments["inputs_embeds"] = self._embed(input_ids, found, features.plits, index)
        inside = features.lal or features.flamingo
        if inside is not None and self._attached() is not None:
            arguments["audio"] = self._state(inside, index, insert_at)
        return arguments

    def _placeholders(self, input_ids: Tensor) -> Tensor | None:
        """(B, T), None where there can be none."""
        token = self.config.audio_token_id
        return torch.eq(input_ids, token) if token is not None and self.config.uses("plits") else None

    def _embed(self, input_ids: Tensor | None, found: Tensor, clips: Clips, index: Tensor) -> Tensor:
        """The text's embeddings (B, T, d), each placeholder replaced by its PLITS token."""
        assert input_ids is not None
        rows = rows_of(clips, index)
        audio = Clips(rows.audio.states[rows.index], rows.audio.lengths[rows.index])
        counts = found.sum(dim=1)
        if not torch.compiler.is_compiling() and not torch.equal(counts, audio.lengths):
            raise ValueError(
                f"input_ids must hold a placeholder, token {self.config.audio_token_id}, for each PLITS token, "
                f"{audio.lengths.tolist()} in the texts, got {counts.tolist()}"
            )
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        tokens = audio.states[audio.valid()].to(embeds.dtype)
        return embeds.masked_scatter(found.unsqueeze(-1), tokens)

    def _state(self, clips: Clips, index: Tensor, insert_at: Tensor | None) -> AudioState:
        rows = rows_of(clips, index)
        states: Any = rows.audio.states
        weight: Any = self.get_input_embeddings().weight
        autocast = torch.is_autocast_enabled(states.device.type)
        dtype = states.dtype if autocast else weight.dtype
        if self.layer_projector:
            layers = (str(layer) for layer in range(self.config.text_config.num_hidden_layers))
            own = self.layer_projector
            states = [own[layer](states).to(dtype) if layer in own else None for layer in layers]
        else:
            states = states.to(dtype)
        if insert_at is not None:
            given = insert_at.reshape(index.shape[0], -1).to(index.device)
            if given.shape != index.shape:
                raise ValueError(f"insert_at must be (B, K) = {tuple(index.shape)}, got {tuple(insert_at.shape)}")
            before = given.masked_fill(index < 0, 0).cummax(dim=1).values
            given = torch.where(index < 0, before, given)  # no clip, no place: that of the clip before it
            insert_at = given.squeeze(1) if given.shape[1] == 1 else places(rows, given)
        return AudioState(states, rows.audio.lengths, rows.index, insert_at)


def _keep_weights(part: nn.Module) -> None:
    """What a constructor has drawn, ``post_init`` must not draw again."""
    for module in part.modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if own and not any(tensor.is_meta for tensor in own):
            module._is_hf_initialized = True  # type: ignore[assignment]


def _index(audio_index: Tensor | None, batch: int, clips: Clips) -> Tensor:
    """(B, K) clips of each text."""
    count = clips.states.shape[0]
    if audio_index is None:
        if count != batch:
            raise ValueError(f"audio_index must be given for {count} clips and {batch} texts, got None")
        return torch.arange(batch, device=clips.lengths.device).unsqueeze(1)
    if audio_index.is_floating_point() or audio_index.is_complex() or audio_index.dtype == torch.bool:
        raise TypeError(f"audio_index must have an integer dtype, got {audio_index.dtype}")
    if audio_index.ndim not in (1, 2) or audio_index.shape[0] != batch:
        raise ValueError(f"audio_index must be (B, K) with B = {batch}, got shape {tuple(audio_index.shape)}")
    index = audio_index.reshape(batch, -1).to(clips.lengths.device, torch.long)
    if index.device.type == "cpu" and index.numel() and not -1 <= int(index.min()) <= int(index.max()) < count:
        raise ValueError(f"audio_index must be from -1 to {count - 1}, got {index.tolist()}")
    return index


AutoModel.register(PalConfig, PalForConditionalGeneration)
AutoModelForMultimodalLM.register(PalConfig, PalForConditionalGeneration)
