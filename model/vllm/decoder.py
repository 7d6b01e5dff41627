"""LAL around a stock language model of vLLM's: audio enters by keys and values alone.

Audio has placeholders in the prompt, so the scheduler gives each audio token a position and a slot in the paged cache;
prefix caching, chunked prefill and preemption treat it like any token. In a step with audio rows

1. each hearing layer's keys and values of these rows are written straight to their slots, from the audio's states;
2. the stock decoder runs on the text rows alone, as :mod:`palkernels.model.vllm.runs` says.

Steps without audio rows, as all that decode, run the stock path, CUDA graphs included.

Where only some layers hear audio (delayed LAL), the others keep the text's keys and values as if there were none: text
token t of a request in slot t of its block table. With rope="none" text has its positions without audio, too.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from palkernels.model.pal import PalConfig
from palkernels.model.vllm.counting import AudioCounts
from palkernels.model.vllm.foretelling import LastStates, carry_over
from palkernels.model.vllm.projection import audio_keys_and_values, check_layer
from palkernels.model.vllm.runs import TextRows, as_if_text, remembering_backend, text_runs
from palkernels.model.vllm.settings import must_count

__all__ = ["LalDecoder"]

NO_SLOT = -1  # where vLLM writes nothing
# Backends whose metadata of one kind stay as they are while those of another are built, as FlashInfer's plans do not.
BUILD_TWICE = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")


class LalDecoder:
    """A language model of vLLM's that is given audio. Not a module: it owns no weights.

    Args:
        language_model: the model, with its head.
        config: of the audio LLM.
        projectors: by a layer's number what projects the audio's states for it; empty: all take them as they are.
        vllm_config: the settings that it is served with.

    Raises:
        ValueError: a layer attends in a window, or its attention backend cannot be used.
    """

    def __init__(
        self, language_model: Any, config: PalConfig, projectors: nn.ModuleDict, vllm_config: VllmConfig
    ) -> None:
        try:
            self.model = language_model.model
            self.layers = list(self.model.layers)
            attentions = [layer.self_attn.attn for layer in self.layers]
        except AttributeError as error:
            raise ValueError(f"the language model must be built as Llama is, to be given audio, got {error}") from error
        self.hearing = config.lal_layers()
        self.projectors = projectors
        self.rotated = config.rope == "sequence"
        self.counted = must_count(config)
        self.width, self.dtype = config.text_config.hidden_size, vllm_config.model_config.dtype
        self.most_runs = vllm_config.scheduler_config.max_num_seqs
        self.counts: AudioCounts | None = None
        self.last_states: LastStates | None = None
        self.names = [attention.layer_name for attention in attentions]
        self.deaf = [name for number, name in enumerate(self.names) if number not in self.hearing]
        for number, attention in enumerate(attentions):
            if attention.sliding_window is not None:
                window = attention.sliding_window
                raise ValueError(f"layer {number} must attend to the whole text, got a sliding window of {window}")
            backend = attention.attn_backend
            if self.deaf and backend.get_name() not in BUILD_TWICE:
                raise ValueError(
                    f"attention_backend must be {', '.join(BUILD_TWICE)} where some layers do not hear the audio, got "
                    f"{backend.get_name()}"
                )
            attention.attn_backend = remembering_backend(backend)

    def check_layers(self) -> None:
        """Check that each hearing layer makes of text the keys and values that audio is given.

        Raises:
            ValueError: one does not.
        """
        for number in self.hearing:
            check_layer(self.layers[number], number, self.width, self.dtype)

    def __call__(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        inputs_embeds: Tensor | None,
        audio: np.ndarray | None,
        states: Tensor | None,
    ) -> Tensor:
        """Return hidden states (N, d) of the rows of a step.

        Those of audio rows are what :mod:`palkernels.model.vllm.foretelling` says.

        Args:
            input_ids: (N,); None where there are embeddings.
            positions: (N,) in each request, audio counted.
            inputs_embeds: (N, d).
            audio: (n,) bool, which of the first n <= N rows are audio, rows behind them are padding; None: no row.
            states: (audio rows, d) of the audio.
        """
        context = get_forward_context()
        if context.attn_metadata is None:  # a run that measures memory or captures
            return self._stock(input_ids, positions, inputs_embeds)
        builder, common = context.attn_metadata[self.names[0]].lal  # full attention only: one KV cache group
        before = self._before(builder, common, positions, audio) if self.counted else None
        if audio is not None:
            assert inputs_embeds is not None
            assert states is not None
            hidden = self._with_audio(context, builder, common, before, positions, inputs_embeds, audio, states)
        elif before is not None:
            hidden = self._without_audio(context, builder, common, before, input_ids, positions, inputs_embeds)
        else:
            hidden = self._stock(input_ids, positions, inputs_embeds)
        self._states_of(hidden).put_prompts(common, hidden)
        return hidden

    def _with_audio(
        self,
        context: ForwardContext,
        builder: Any,
        common: CommonAttentionMetadata,
        before: Tensor | None,
        positions: Tensor,
        inputs_embeds: Tensor,
        audio: np.ndarray,
        states: Tensor,
    ) -> Tensor:
        """Return hidden states of a step with audio rows."""
        self._write(context, positions, audio, states)
        hidden = torch.zeros_like(inputs_embeds)
        passes = [] if audio.all() else text_runs(common, audio, self.most_runs)
        for runs in passes:
            text = TextRows.of_runs(common, runs)
            changed, places = self._context_of(context, builder, text, positions[text.rows], before)
            with override_forward_context(changed):
                hidden[text.rows] = self.model(None, places, None, inputs_embeds=inputs_embeds[text.rows])
        all_runs = [run for runs in passes for run in runs]
        block_size = builder.kv_cache_spec.block_size
        carry_over(hidden, common, audio, all_runs, positions, self._states_of(hidden), block_size)
        return hidden

    def _states_of(self, hidden: Tensor) -> LastStates:
        """Return what is remembered of earlier steps."""
        if self.last_states is None:
            self.last_states = LastStates(self.most_runs, hidden)
        return self.last_states

    def _stock(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None) -> Tensor:
        hidden: Tensor = self.model(input_ids, positions, None, inputs_embeds=inputs_embeds)
        return hidden

    def _write(self, context: ForwardContext, positions: Tensor, audio: np.ndarray, states: Tensor) -> None:
        """Write every hearing layer's keys and values of audio rows to their slots."""
        rows = torch.from_numpy(np.flatnonzero(audio)).to(positions.device)
        places = positions[rows] if self.rotated else None
        slots = context.slot_mapping[self.names[0]][rows]
        for number in self.hearing:
            layer, own = self.layers[number], states
            if self.projectors:
                own = self.projectors[str(number)](states)
            key, value = audio_keys_and_values(layer, own, places)
            attention = layer.self_attn.attn
            attention.impl.do_kv_cache_update(attention, key, value, attention.kv_cache, slots)

    def _context_of(
        self, context: ForwardContext, builder: Any, text: TextRows, positions: Tensor, before: Tensor | None
    ) -> tuple[ForwardContext, Tensor]:
        """Return the forward context of some text rows alone, and their positions."""
        metadata = dict.fromkeys(self.names, builder.build(0, text.common))
        slots = dict.fromkeys(self.names, text.common.slot_mapping)
        if before is not None:
            earlier = before[text.request] + text.audio_before
            silent, own = self._silent(builder, text.common, earlier, text.lengths, positions)
            metadata |= dict.fromkeys(self.deaf, builder.build(0, silent)) if self.deaf else {}
            slots |= dict.fromkeys(self.deaf, silent.slot_mapping)
            positions = positions if self.rotated else own
        return _eager(context, metadata, slots), positions

    def _without_audio(
        self,
        context: ForwardContext,
        builder: Any,
        common: CommonAttentionMetadata,
        before: Tensor,
        input_ids: Tensor | None,
        positions: Tensor,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        """Return hidden states of a step without audio rows, whose requests may have heard some before."""
        rows = int(common.query_start_loc_cpu[-1])
        lengths = common.query_start_loc.diff()
        silent, own = self._silent(builder, common, before, lengths, positions[:rows])
        changed = context
        if self.deaf:
            slots = torch.full_like(context.slot_mapping[self.deaf[0]], NO_SLOT)
            slots[:rows] = silent.slot_mapping
            metadata = context.attn_metadata | dict.fromkeys(self.deaf, builder.build(0, silent))
            changed = dataclasses.replace(
                context, attn_metadata=metadata, slot_mapping=context.slot_mapping | dict.fromkeys(self.deaf, slots)
            )
        if not self.rotated:  # graphs read positions where the runner keeps them
            places = positions.clone()
            places[:rows] = own
            changed = _eager(changed, changed.attn_metadata, changed.slot_mapping)
            positions = places
        with override_forward_context(changed):
            return self._stock(input_ids, positions, inputs_embeds)

    def _silent(
        self, builder: Any, common: CommonAttentionMetadata, before: Tensor, lengths: Tensor, positions: Tensor
    ) -> tuple[CommonAttentionMetadata, Tensor]:
        return as_if_text(common, before, lengths, positions, builder.kv_cache_spec.block_size)

    def _before(
        self, builder: Any, common: CommonAttentionMetadata, positions: Tensor, audio: np.ndarray | None
    ) -> Tensor:
        """Return how much audio (requests,) stands before each request's rows of this step."""
        if self.counts is None:
            attention = self.layers[0].self_attn.attn
            slots = attention.kv_cache.numel() // (2 * attention.num_kv_heads * attention.head_size)
            self.counts = AudioCounts(slots // builder.kv_cache_spec.block_size, positions.device)
        return self.counts.before(common, positions, audio)


def _eager(context: ForwardContext, metadata: Any, slots: Any) -> ForwardContext:
    """Return a forward context for rows for which no graph was captured."""
    return dataclasses.replace(
        context,
        attn_metadata=metadata,
        slot_mapping=slots,
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        batch_descriptor=None,
        is_padding=None,
    )
