"""The part of an audio LLM that hears: from a batch's clips to what its texts take of them."""

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from palkernels.model.causal_lm.attached import Attached
from palkernels.model.causal_lm.facts import DeviceFacts
from palkernels.model.causal_lm.memory import Memory, forget, memory_of
from palkernels.model.causal_lm.state import AudioState
from palkernels.model.pal.clips import Clips, audio_rows, token_places
from palkernels.model.pal.encoding import Encoding
from palkernels.model.pal.hearing import Hearing, Step, recall, step_of
from palkernels.model.pal.inputs import AudioInputs, clip_index
from palkernels.model.pal.placeholders import place_of, places_in

__all__ = ["Listener"]


class Listener(Encoding):
    """Mixed into :class:`PalForConditionalGeneration`, whose parts and texts it needs."""

    __call__: Callable[..., Any]
    generation_config: Any
    language_model: Any
    layer_projector: nn.ModuleDict

    def attached(self) -> Attached | None:
        """Return the language model's handle; None if none of its layers takes audio."""
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError

    def listen(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, audio: AudioInputs, before: Tensor | None
    ) -> tuple[Hearing, Tensor | None]:
        """Return what texts hear, and which of their columns (B, T) are placeholders; None if none can be.

        Args:
            before: (B,) the placeholders that stand before these texts; None: there are none.
        """
        features = audio.audio_features
        if features is None and audio.has_clips:
            features = self.get_audio_features(
                audio.input_features, audio.audio_lengths, encoder_states=audio.encoder_states
            )
        ways = {} if features is None else features.by_integration()
        places = self.places(input_ids, inputs_embeds)
        if not ways:
            return Hearing(), places
        texts = input_ids if inputs_embeds is None else inputs_embeds
        if texts is None:
            raise ValueError("input_ids or inputs_embeds must be given, got neither")
        counts = None
        if "plits" in ways and places is not None:
            counts = places.sum(dim=1) if before is None else places.sum(dim=1) + before
        first = ways.get("plits") or next(iter(ways.values()))
        index = clip_index(audio.audio_index, audio.texts_of(texts.shape[0]), first, counts)
        tokens = state = None
        if "plits" in ways:
            # A packed row's placeholders are those of its texts, one after another.
            rows = audio_rows(ways["plits"], index.reshape(texts.shape[0], -1))
            tokens = Clips(rows.audio.states[rows.index], rows.audio.lengths[rows.index].to(texts.device))
        inside = ways.get("lal") or ways.get("flamingo")
        if inside is not None and self.attached() is not None:
            state = self._audio_state(inside, index, audio.insert_at)
        return Hearing(tokens, state), places

    def step(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        audio: AudioInputs,
        cache: Any,
        labels: Tensor | None,
        mask: Tensor | None,
    ) -> Step:
        """Return the audio of a forward that is called by hand; of a cache that has heard some, without it again.

        Args:
            mask: (B, columns) the tokens of the whole conversation; None: all columns.

        Raises:
            TypeError, ValueError: text, audio and labels do not fit each other.
        """
        audio.check()
        texts = input_ids if inputs_embeds is None else inputs_embeds
        if texts is None:
            raise ValueError("input_ids or inputs_embeds must be given, got neither")
        batch, memory = texts.shape[0], memory_of(cache)
        hearing, earlier = (Hearing(), None) if memory is None else recall(memory, batch, mask)
        start = 0 if cache is None else cache.get_seq_length()
        if isinstance(start, Tensor) and not torch.compiler.is_compiling():
            start = int(start)
        if audio.has_clips:
            so_far = None if earlier is None else earlier.up_to(start).counts()
            hearing, places = self.listen(input_ids, inputs_embeds, audio, so_far)
        else:
            places = None if input_ids is None else self.places(input_ids, None)
        if not hearing.present:
            forget(cache)
            if memory is None and not audio.has_clips and places is None:
                self.warn_of_marks(input_ids)
        if places is None:
            rows = torch.arange(batch, device=texts.device)
            memory = None if hearing.state is None else Memory(hearing.state, rows)
            return Step(audio=hearing.state, memory=memory)
        where = place_of(input_ids, inputs_embeds)
        token = self.config.audio_token_id
        return step_of(hearing, earlier, start, places, labels, token, complete=cache is None, where=where)

    def places(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor | None:
        """Return which columns of texts (B, T) are placeholders; None if none can be."""
        token = self.config.audio_token_id
        if token is None or not self.config.uses("plits"):
            return None
        return places_in(self.get_input_embeddings(), token, input_ids, inputs_embeds)

    def warn_of_marks(self, input_ids: Tensor | None) -> None:
        """Warn where a text that is given no audio marks a clip, of which a model without PLITS sees nothing."""
        token = self.config.audio_token_id
        if token is None or self.config.uses("plits") or input_ids is None:
            return
        facts = DeviceFacts()
        facts.ask("marked", torch.eq(input_ids, token).any())
        if (facts.read() or {}).get("marked"):
            warnings.warn(f"input_ids marks a clip by token {token}, but no audio is given", stacklevel=3)

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
