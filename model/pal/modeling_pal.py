"""The whole audio LLM: encoders, connectors and a language model that ``attach`` lets take audio."""

import copy
import inspect
import warnings
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils import TransformersKwargs

from palkernels.model.causal_lm.attach import attach
from palkernels.model.causal_lm.attached import HANDLE
from palkernels.model.causal_lm.caches import cache_keyword, cache_of, prepared_whole
from palkernels.model.causal_lm.flamingo import FlamingoHandle, attach_flamingo
from palkernels.model.causal_lm.freezing import freeze_ffn
from palkernels.model.causal_lm.handle import LalHandle
from palkernels.model.causal_lm.memory import cache_after
from palkernels.model.causal_lm.support import base_model
from palkernels.model.pal.clips import AudioFeatures
from palkernels.model.pal.configuration_pal import PalConfig
from palkernels.model.pal.generation import LISTEN, STEP, current, generation_of
from palkernels.model.pal.hearing import labels_of
from palkernels.model.pal.initialization import check_initialization, start_at_sink
from palkernels.model.pal.inputs import AudioInputs
from palkernels.model.pal.listening import Listener
from palkernels.model.pal.parts import (
    build_connectors,
    build_towers,
    check_room,
    check_settings,
    choose_attention,
    entries_with_tower_configs,
    keep_weights,
    reset_weights,
    with_attention_of_encoders,
)

__all__ = ["PalForConditionalGeneration"]

# Keywords that pass through forward besides those of transformers and of the language model.
PASSED_ON = frozenset({"return_dict", "token_type_ids", "cache_position", "shift_labels"})


class PalForConditionalGeneration(Listener, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """An audio LLM with the interface of Hugging Face's own, such as Qwen2-Audio and Voxtral.

    ``forward`` and ``generate`` take what :class:`PalProcessor` returns:

    - input_ids, attention_mask (B, T): texts, padded on either side in ``forward``, on the left in ``generate``. Every
      token that enters by PLITS has a placeholder ``config.audio_token_id`` there, in the order of the clips.
    - input_features: the windows of C clips in order as the tower's ``features`` makes them, (W, ...), or a list of
      them, one per tower. A clip longer than a tower hears has several, all full but its last; W may differ by tower.
    - encoder_states: instead of them the states (W, N, width) that a tower made of them, or a list with a tensor for
      each tower; states beyond the valid ones may be cut off. No tower runs.
    - audio_lengths (C,) or (C, towers): the valid states of each clip, of all its windows together; None: each window
      is a clip, and all its states are valid.
    - audio_index (B, K): the clips of each text in their order, -1 where there is none; None: the clips are heard in
      their order, each text as many as fill its placeholders; without PLITS clip b belongs to text b, and C == B.
      Texts may share a clip. Packed texts, one after another in a single row (1, T), are told by position_ids that
      count each from 0: then B is their number here and in insert_at.
    - insert_at (B,) or (B, K): where the audio of each clip that enters by LAL or Flamingo stands in the text, in
      tokens without padding, not decreasing; None: before the text. Placeholders count as text: with an ``insert_at``
      in front of a clip's placeholders they see its other audio. The paper leaves this open.

    In a sequence that continues a cache, (B, T) are the new tokens; ``generate`` takes the whole conversation, too. The
    cache remembers what its texts have heard, and no clips need to be given. Where a turn brings new ones, all clips of
    the conversation are given, for which ``audio_features`` spares encoding them again.

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
    _can_compile_fullgraph = True

    def __init__(
        self,
        config: PalConfig,
        language_model: PreTrainedModel | None = None,
        towers: Sequence[nn.Module | None] | None = None,
    ) -> None:
        super().__init__(config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        else:
            keep_weights(language_model)
        self.language_model = language_model
        run = type(base_model(language_model)).forward
        self._cache_keyword = cache_keyword(run) or "past_key_values"
        self._keywords = PASSED_ON | TransformersKwargs.__optional_keys__ | set(inspect.signature(run).parameters)
        built_towers = build_towers(config, towers)
        self.audio_tower = nn.ModuleList(built_towers)
        self.multi_modal_projector = nn.ModuleList(build_connectors(config, built_towers))
        width = config.text_config.hidden_size
        projected_layers = config.lal_layers() if config.projection == "per_layer" else []
        self.layer_projector = nn.ModuleDict({str(layer): nn.Linear(width, width) for layer in projected_layers})
        self.gated_layer = nn.ModuleDict()
        handle = self.attached()  # refuses a language model that cannot be attached
        if handle is None and not config.uses("plits"):
            warnings.warn("layers should name a layer that hears the audio, got none: nobody hears it", stacklevel=2)
        if isinstance(handle, FlamingoHandle):
            self.gated_layer = handle.layers
        self._freeze()
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, from safetensors unless ``use_safetensors`` says otherwise."""
        loaded = super().from_pretrained(*args, **{"use_safetensors": True, **kwargs})
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        model._freeze()  # loading forgets it
        return loaded

    @classmethod
    def from_parts(
        cls,
        language_model: PreTrainedModel,
        encoders: Sequence[dict[str, Any]],
        towers: Sequence[nn.Module | None] | None = None,
        *,
        initialization: str = "sink",
        **settings: Any,
    ) -> Self:
        """Return an audio LLM around a language model that is there already, which is used, not copied; all parts get
        its dtype and device.

        Args:
            language_model: any causal LM that ``attach`` takes.
            encoders: entries as in :class:`PalConfig`. A tower in ``towers`` brings its own ``config``.
            towers: one per encoder, and two for an entry with LFST, in their order; None: one with random weights.
                ``TOWERS[...].from_checkpoint`` gives trained ones.
            initialization: of connectors: "sink", as :func:`start_at_sink` says, which runs the language model once if
                audio enters by LAL; or "random".
            settings: the other arguments of PalConfig.

        Raises:
            TypeError, ValueError: the parts do not fit each other, or PalConfig has no such argument.
        """
        check_initialization(initialization)
        check_room(settings.get("audio_token_id"), language_model)
        encoders = entries_with_tower_configs(encoders, towers)
        check_settings(settings)
        settings, attn_implementation = with_attention_of_encoders(settings)
        config = PalConfig(text_config=language_model.config, encoders=encoders, **settings)
        model = cls(config, language_model, towers)
        model.set_attn_implementation(attn_implementation)
        model.generation_config = copy.deepcopy(language_model.generation_config)
        for part in (model.audio_tower, model.multi_modal_projector, model.layer_projector):
            part.to(device=language_model.device, dtype=language_model.dtype)
        if initialization == "sink":
            start_at_sink(config, language_model, model.multi_modal_projector, model.layer_projector)
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

    def set_attn_implementation(self, attn_implementation: Any, allow_all_kernels: bool = False) -> None:
        """Choose how the parts attend, as ``attn_implementation`` of :class:`PalConfig` does; all of them or none."""
        parts: Any = [*self.audio_tower, *self.multi_modal_projector]
        choose_attention(self, base_model(self.language_model), parts, attn_implementation, allow_all_kernels)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # As custom code transformers would pass over a module without tensors of its own; a tower draws its encoder's.
        super()._initialize_weights(module)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the weights that a checkpoint lacks, as the module's constructor does."""
        if not reset_weights(module):
            super()._init_weights(module)

    def attached(self) -> LalHandle | FlamingoHandle | None:
        """Attach the language model if it is not, and return its handle; None if none of its layers takes audio."""
        if self.config.lal_layers():
            lal = attach(self.language_model, self.config.lal())
            if lal.owner is None:
                lal.owner = type(self).__name__
            return lal
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
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        encoder_states: Tensor | Sequence[Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the language model once on texts and audio. Arguments that the class does not describe are its own.

        Args:
            labels: (B, T), -100 where there is none: at placeholders, too, which the processor sees to.
            position_ids: (B, T) positions in each text, without LAL's audio.
            logits_to_keep: as in transformers: for how many of the last tokens logits are computed; 0: all.
            cache: what transformers calls ``past_key_values`` since 5.24.

        Returns:
            The language model's output: loss, logits (B, T, vocabulary), past_key_values.

        Raises:
            TypeError, ValueError: text, audio and labels do not fit each other, or a keyword is not known.
        """
        clips = input_features, audio_lengths, audio_index, insert_at, audio_features, encoder_states
        audio = AudioInputs(*clips, position_ids)
        if LISTEN in kwargs:
            return self.listen(input_ids, inputs_embeds, audio, *kwargs[LISTEN])
        step = kwargs.pop(STEP, None)
        self._check_keywords({**kwargs, **({} if cache is None else {"cache": cache})})
        cache = cache_of({"past_key_values": past_key_values, "cache": cache})
        if step is None:
            final = labels_of(labels, kwargs.get("shift_labels"))
            step = self.step(input_ids, inputs_embeds, audio, cache, final, attention_mask)
        texts = self.get_input_embeddings(), input_ids, inputs_embeds
        if self.training:
            parts = self.audio_tower, self.multi_modal_projector, self.layer_projector, self.gated_layer
            ways = self.config.uses("plits") + (self.config.uses("lal") or self.config.uses("flamingo"))
            arguments = step.trained_texts(*texts, parts, ways)
        else:
            arguments = step.texts(*texts)
        optional: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
        optional |= {self._cache_keyword: cache, "use_cache": use_cache}
        arguments |= {name: value for name, value in optional.items() if value is not None}
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            arguments["logits_to_keep"] = logits_to_keep
        outputs = self.language_model(**arguments, **kwargs)
        step.keep(cache_after(cache, outputs))
        return outputs

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        input_features: Tensor | Sequence[Tensor] | None = None,
        audio_lengths: Tensor | None = None,
        audio_index: Tensor | None = None,
        insert_at: Tensor | None = None,
        audio_features: AudioFeatures | None = None,
        encoder_states: Tensor | Sequence[Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does, with all its arguments. The audio is encoded and projected once.

        Returns:
            What transformers returns: tokens (B, prompt and new ones), or with ``return_dict_in_generate=True`` its
            output object.

        Raises:
            TypeError, ValueError: audio and prompt do not fit each other, or an option cannot be served.
        """
        audio = AudioInputs(input_features, audio_lengths, audio_index, insert_at, audio_features, encoder_states)
        arguments = {"inputs": inputs, "generation_config": generation_config, **kwargs}
        with generation_of(self, audio, arguments):
            return super().generate(**arguments)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching, which takes no audio.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "generate_batch must not be called on an audio LLM: continuous batching takes no audio; generate does, and "
            "language_model.generate_batch takes texts alone"
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of one forward of ``generate``: the language model's own, and the audio."""
        generation = current(self)
        columns = None if generation is None else generation.new_columns(input_ids, cache_of(kwargs))
        if columns is not None:
            kwargs.setdefault("next_sequence_length", None)
            kwargs["next_sequence_length"] = kwargs["next_sequence_length"] or columns
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds, **kwargs}
        arguments = prepared_whole(base_model(self.language_model).prepare_inputs_for_generation, given)
        if generation is not None:
            generation.prepare(arguments)
        return arguments

    def _check_keywords(self, kwargs: dict[str, Any]) -> None:
        """Refuse keywords that the language model would pass over."""
        unknown = sorted(name for name in kwargs if name not in self._keywords)
        if unknown:
            raise TypeError(f"forward must be given keywords that it or the language model knows, got {unknown}")
