"""The whole audio LLM: encoders, connectors and a language model that ``attach`` lets take audio."""

import copy
from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init

from palkernels.model.causal_lm.attach import attach
from palkernels.model.causal_lm.attached import HANDLE
from palkernels.model.causal_lm.caches import CACHE_KEYWORDS, cache_of
from palkernels.model.causal_lm.flamingo import FlamingoHandle, attach_flamingo
from palkernels.model.causal_lm.freezing import freeze_ffn
from palkernels.model.causal_lm.gated_layer import GatedLayer
from palkernels.model.causal_lm.handle import LalHandle
from palkernels.model.causal_lm.state import AudioState
from palkernels.model.causal_lm.support import base_model
from palkernels.model.connectors.base import Connector
from palkernels.model.pal.clips import AudioFeatures, Clips, audio_rows, join, summaries, token_places
from palkernels.model.pal.configuration_pal import PalConfig
from palkernels.model.pal.inputs import AudioInputs, clip_index, embed_with_plits, lengths_by_tower
from palkernels.model.pal.parts import (
    build_connectors,
    build_towers,
    by_entry,
    connect,
    entries_with_tower_configs,
    keep_weights,
)

__all__ = ["PalForConditionalGeneration"]

IGNORED = -100  # a label that the loss passes over


class PalForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """An audio LLM with the interface of Hugging Face's own, such as Qwen2-Audio and Voxtral.

    ``forward`` and ``generate`` take what :class:`PalProcessor` returns:

    - input_ids, attention_mask (B, T): texts, padded on either side in ``forward``, on the left in ``generate``. Every
      token that enters by PLITS has a placeholder ``config.audio_token_id`` there, in the order of the clips.
    - input_features: C clips as the tower's ``features`` makes them, (C, ...), or a list of them, one per tower.
    - audio_lengths (C,) or (C, towers): the valid states of each clip; None: all.
    - audio_index (B, K): the clips of each text in their order, -1 where there is none; None: clip b belongs to text
      b, and C == B. Texts may share a clip.
    - insert_at (B,) or (B, K): where the audio of each clip that enters by LAL or Flamingo stands in the text, in
      tokens without padding, not decreasing; None: before the text. Placeholders count as text: with an ``insert_at``
      in front of a clip's placeholders they see its other audio. The paper leaves this open.

    In a sequence that continues a cache, (B, T) are the new tokens. All clips of the conversation are given again,
    because LAL's audio lies in no text cache; as ``audio_features`` they are not encoded again. PLITS tokens do lie in
    the cache, and are not looked at where ``input_ids`` has no placeholder. ``generate`` takes the whole conversation
    and its cache.

    Args:
        config: the parts and how they go together.
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
        built_towers = build_towers(config, towers)
        self.audio_tower = nn.ModuleList(built_towers)
        self.multi_modal_projector = nn.ModuleList(build_connectors(config, built_towers))
        width = config.text_config.hidden_size
        projected_layers = config.lal_layers() if config.projection == "per_layer" else []
        self.layer_projector = nn.ModuleDict({str(layer): nn.Linear(width, width) for layer in projected_layers})
        self.gated_layer = nn.ModuleDict()
        handle = self._attached()  # refuses a language model that cannot be attached
        if isinstance(handle, FlamingoHandle):
            self.gated_layer = handle.layers
        for part in (self.multi_modal_projector, self.layer_projector, self.gated_layer):
            keep_weights(part)
        self._freeze()
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, from safetensors unless ``use_safetensors`` says otherwise.

        Loading forgets what is frozen; what the config says is so again.
        """
        loaded = super().from_pretrained(*args, **{"use_safetensors": True, **kwargs})
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        model._freeze()
        return loaded

    @classmethod
    def from_parts(
        cls,
        language_model: PreTrainedModel,
        encoders: Sequence[dict[str, Any]],
        towers: Sequence[nn.Module | None] | None = None,
        **settings: Any,
    ) -> Self:
        """Return an audio LLM around a language model that is there already, which is used, not copied.

        Connectors have random weights. All parts get the language model's dtype and device.

        Args:
            language_model: any causal LM that ``attach`` takes.
            encoders: entries as in :class:`PalConfig`. A tower in ``towers`` brings its own ``config``.
            towers: one per encoder, and two for an entry with LFST, in their order; None: one with random weights.
                ``TOWERS[...].from_checkpoint`` gives trained ones.
            settings: the other arguments of PalConfig.

        Raises:
            TypeError, ValueError: the parts do not fit each other.
        """
        encoders = entries_with_tower_configs(encoders, towers)
        config = PalConfig(text_config=language_model.config, encoders=encoders, **settings)
        model = cls(config, language_model, towers)
        model.generation_config = copy.deepcopy(language_model.generation_config)
        for part in (model.audio_tower, model.multi_modal_projector, model.layer_projector):
            part.to(device=language_model.device, dtype=language_model.dtype)
        return model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the whole model as transformers does, in safetensors.

        Raises:
            ValueError: the model holds peft's adapters, under which weights have names that nothing would load.
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
        """Draw the weights that a checkpoint lacks."""
        super()._init_weights(module)
        if isinstance(module, Connector):  # its queries and the like, which are parameters of no submodule
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=0.02)
        elif isinstance(module, GatedLayer):
            init.zeros_(module.attention_gate)
            init.zeros_(module.ffn_gate)

    def _attached(self) -> LalHandle | FlamingoHandle | None:
        """Attach the language model if it is not, and return its handle; None if none of its layers takes audio."""
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
        """Pass clips through encoders and connectors. The arguments are those of ``forward``.

        Returns:
            AudioFeatures of tokens (C, N, d). N depends on encoder and connector; the tokens of several encoders are
            joined clip by clip.

        Raises:
            ValueError: there is not a tensor for every tower, or the lengths have another shape.
        """
        features = [input_features] if isinstance(input_features, Tensor) else list(input_features)
        count = len(self.audio_tower)
        if len(features) != count:
            raise ValueError(f"input_features must hold a tensor for each of {count} towers, got {len(features)}")
        encoded = [tower(clips) for tower, clips in zip(self.audio_tower, features, strict=True)]
        lengths = lengths_by_tower(audio_lengths, encoded)
        entries = by_entry(self.config.encoders, list(zip(encoded, lengths, strict=True)))
        by_integration: dict[str, list[Clips]] = {}
        for connector, (entry, of_towers) in zip(self.multi_modal_projector, entries, strict=True):
            clips = connect(cast(Connector, connector), [states for states, _ in of_towers], of_towers[0][1])
            by_integration.setdefault(entry["integration"], []).append(clips)
        if self.config.summary_tokens:
            by_integration["plits"] = [summaries(by_integration["lal"][0], self.config.summary_tokens)]
        return AudioFeatures(**{integration: join(parts)[0] for integration, parts in by_integration.items()})

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
        """Run the language model once on texts and audio. Arguments that the class does not describe are its own.

        Args:
            labels: (B, T), -100 where there is none. Labels at placeholders are ignored.
            position_ids: (B, T) positions in each text, without LAL's audio.

        Returns:
            The language model's output: loss, logits (B, T, vocabulary), past_key_values.
        """
        audio = AudioInputs(input_features, audio_lengths, audio_index, insert_at, audio_features)
        cache = cache_of({"past_key_values": past_key_values, **kwargs})
        kwargs = {keyword: argument for keyword, argument in kwargs.items() if keyword not in CACHE_KEYWORDS}
        arguments = self._with_audio(input_ids, inputs_embeds, audio, cache)
        if "inputs_embeds" in arguments:
            arguments.pop("input_ids", None)
        placeholders = None if input_ids is None else self._placeholders(input_ids)
        if labels is not None and placeholders is not None:
            labels = labels.masked_fill(placeholders, IGNORED)
        optional = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE_KEYWORDS[0]: cache,
            "labels": labels,
            "use_cache": use_cache,
        }
        arguments |= {name: value for name, value in optional.items() if value is not None}
        return self.language_model(**arguments, **kwargs)

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
        """Generate by the language model's ``generate``, all its keywords included.

        The audio is encoded and projected once.

        Returns:
            The language model's own result: tokens (B, prompt and new ones), or with ``return_dict_in_generate=True``
            its output object.
        """
        prompt = inputs if input_ids is None else input_ids
        audio = AudioInputs(input_features, audio_lengths, audio_index, insert_at, audio_features)
        arguments = self._with_audio(prompt, inputs_embeds, audio, cache=None)
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        base_model(self.language_model).generation_config = self.generation_config
        return self.language_model.generate(**arguments, **kwargs)

    def _with_audio(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, audio: AudioInputs, cache: Any
    ) -> dict[str, Any]:
        """Return the language model's arguments: text, with PLITS tokens in their places, and LAL's audio."""
        features = audio.audio_features
        if audio.input_features is not None:
            if features is not None:
                raise ValueError("audio must be input_features or audio_features, got both")
            features = self.get_audio_features(audio.input_features, audio.audio_lengths)
        arguments: dict[str, Any] = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        arguments = {name: tensor for name, tensor in arguments.items() if tensor is not None}
        if not arguments:
            raise ValueError("input_ids or inputs_embeds must be given, got neither")
        placeholders = None if input_ids is None else self._placeholders(input_ids)
        if features is None or not any(features):
            if placeholders is not None and not torch.compiler.is_compiling() and bool(placeholders.any()):
                count = int(placeholders.sum())
                raise ValueError(f"audio must be given for {count} placeholders in input_ids, got none")
            return arguments
        batch = next(iter(arguments.values())).shape[0]
        index = clip_index(audio.audio_index, batch, next(clips for clips in features if clips is not None))
        if features.plits is not None:
            token = self.config.audio_token_id
            if input_ids is None or placeholders is None or token is None or inputs_embeds is not None:
                raise ValueError("input_ids must be given alone where audio enters by PLITS, got inputs_embeds")
            continued = cache is not None and cache.get_seq_length() > 0
            if not continued or bool(placeholders.any()):
                embedding = self.get_input_embeddings()
                arguments["inputs_embeds"] = embed_with_plits(embedding, input_ids, token, features.plits, index)
        inside = features.lal or features.flamingo
        if inside is not None and self._attached() is not None:
            arguments["audio"] = self._audio_state(inside, index, audio.insert_at)
        return arguments

    def _placeholders(self, input_ids: Tensor) -> Tensor | None:
        """Return (B, T), True at placeholders; None if there can be none."""
        token = self.config.audio_token_id
        return torch.eq(input_ids, token) if token is not None and self.config.uses("plits") else None

    def _audio_state(self, clips: Clips, index: Tensor, insert_at: Tensor | None) -> AudioState:
        """Return the audio that enters the language model's layers, in the dtype that they compute in."""
        rows = audio_rows(clips, index)
        places = None if insert_at is None else token_places(rows, insert_at, index)
        states, weight = rows.audio.states, cast(Tensor, self.get_input_embeddings().weight)
        dtype = states.dtype if torch.is_autocast_enabled(states.device.type) else weight.dtype
        if not self.layer_projector:
            return AudioState(states.to(dtype), rows.audio.lengths, rows.index, places)
        projectors = dict(self.layer_projector.items())
        layers = [projectors.get(str(layer)) for layer in range(self.config.text_config.num_hidden_layers)]
        by_layer = [None if projector is None else projector(states).to(dtype) for projector in layers]
        return AudioState(by_layer, rows.audio.lengths, rows.index, places)
