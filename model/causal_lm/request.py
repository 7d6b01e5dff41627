"""What one forward with audio hands to the layers: audio keys and values, and what each text sees."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from palkernels.model.causal_lm.fast_path import project_fused
from palkernels.model.causal_lm.layers import AudioKV, Rotation, project_audio, rotate
from palkernels.model.causal_lm.plan import Plan
from palkernels.model.causal_lm.state import AudioState
from palkernels.model.causal_lm.texts import Texts

REQUEST_KEYWORD = "lal_request"  # of the layers: transformers hands it through untouched, as it is no tensor


class Carried:
    """A request as layers are handed it: no dataclass, which FSDP2 would look into and copy."""

    def __init__(self, request: "Request") -> None:
        self.request = request


@dataclass(eq=False)
class Request(ABC):
    """One forward's audio, ready for every layer that takes it."""

    state: AudioState
    plan: Plan
    texts: Texts
    cached: dict[int, AudioKV] | None  # by layer index, K and V that are made already; None: none are kept
    consumed: set[int] = field(default_factory=set, init=False)  # indices of layers that have taken the audio
    ran: bool = field(default=False, init=False)

    @abstractmethod
    def project(self, index: int) -> AudioKV:
        """Make K and V of the audio in one layer."""

    @abstractmethod
    def positions(self) -> Tensor:
        """Return the positions (B, T) that the model must be given for the texts."""

    def following(self, texts: Texts) -> Self:
        """Return the request of a later step of generation, with the same plan and the same cached keys and values."""
        return replace(self, texts=texts)

    def audio_kv(self, index: int) -> AudioKV:
        """Return K and V of the audio in one layer."""
        if self.cached is not None and index in self.cached:
            return self.cached[index]
        projected = self.project(index)
        if self.cached is not None:
            self.cached[index] = projected
        return projected

    def states_of(self, index: int) -> Tensor:
        """Return the states (A, N, d) that one layer takes."""
        states = self.state.for_layer(index)
        if states is None:
            raise ValueError(f"states must hold a tensor for layer {index}, which takes audio, got None")
        return states


@dataclass(frozen=True)
class KeySpan:
    """Which of a layer's text keys are valid, and from which one on audio is seen; as lal_attention takes them."""

    text_start: Tensor | None  # (B,)
    text_end: Tensor | None  # (B,)
    visible_from: Tensor | None  # (B, N)


@dataclass(eq=False, kw_only=True)
class LalRequest(Request):
    """One forward's audio for LAL: keys and values of the model's own attention."""

    modules: Sequence[nn.Module]  # the decoder layers
    selected: tuple[int, ...]  # indices of those that take audio
    rotations: tuple[Rotation | None, ...]  # per layer, cos and sin (P or 1, N, R); None: keys are not rotated
    shifted: bool  # whether the text's positions make room for the audio
    impl: str
    recompute: bool  # whether K and V are projected again for the backward pass, not kept
    norm_offset: float | None  # of audio_kv, where it takes the layers' weights; None: the modules are called
    _spans: dict[int, KeySpan] = field(default_factory=dict, init=False)  # by the length of a layer's keys

    def positions(self) -> Tensor:
        return self.plan.positions(self.texts, shifted=self.shifted)

    def key_span(self, room: int) -> KeySpan:
        """Return the valid keys of a layer whose keys are (B, Hkv, room, D): once per forward and room.

        Layers differ in it: a sliding-window cache has dropped the oldest keys, a preallocated one is longer than they
        are. Positions count from the first key that is left.
        """
        if torch.compiler.is_compiling():  # the compiler computes it once anyway, and must not have to keep it
            return self._key_span(room)
        if room not in self._spans:
            self._spans[room] = self._key_span(room)
        return self._spans[room]

    def _key_span(self, room: int) -> KeySpan:
        num_keys, text_start, text_end, visible_from = self.texts.num_keys, self.plan.text_start, None, None
        dropped: int | Tensor
        if isinstance(num_keys, Tensor):
            dropped = (num_keys - room).clamp(min=0)
            text_end = num_keys.clamp(max=room).expand(self.texts.batch)
        else:
            dropped = max(num_keys - room, 0)
            if num_keys < room:
                self.texts.check_room(room)
                text_end = torch.full((self.texts.batch,), num_keys, device=self.texts.device)
        if self.plan.layout.insert_at is not None:
            visible_from = self.plan.layout.insert_at - dropped
            if text_start is not None:
                visible_from = visible_from + text_start.unsqueeze(1)
        if text_start is not None:
            text_start = (text_start - dropped).clamp(min=0)
        return KeySpan(text_start, text_end, visible_from)

    def project(self, index: int) -> AudioKV:
        if self.norm_offset is None:
            return self._placed(index, *project_audio(self.modules[index], self.states_of(index)))
        return self._project_fused([index], self.norm_offset)[index]

    def project_at_once(self) -> None:
        """Make every layer's K and V before the first layer runs, if that is possible and pays.

        With gradients it does not: each layer's are then made where they are used. Layers that share their states are
        projected in one call.
        """
        if self.norm_offset is None or torch.is_grad_enabled():
            return
        shared = isinstance(self.state.states, Tensor)
        groups = [self.selected] if shared else [(index,) for index in self.selected]
        made = {} if self.cached is None else self.cached
        for group in groups:
            made.update(self._project_fused(group, self.norm_offset))
        self.cached = made

    def _project_fused(self, indices: Sequence[int], norm_offset: float) -> dict[int, AudioKV]:
        """Make K and V of plain layers that share their states, by one audio_kv.

        For the backward pass it keeps its arguments alone, where the modules keep several times as much as K and V.
        """
        rotated_later = self.plan.layout.audio_rows is not None
        rotations = [None if rotated_later else self.rotations[index] for index in indices]
        modules = [self.modules[index] for index in indices]
        projected = project_fused(modules, self.states_of(indices[0]), norm_offset, rotations, self.impl)
        if rotated_later:
            projected = [self._placed(index, *kv) for index, kv in zip(indices, projected, strict=True)]
        return dict(zip(indices, projected, strict=True))

    def _placed(self, index: int, key: Tensor, value: Tensor) -> AudioKV:
        """Turn K and V of each audio row into those of each audio row and place, and rotate keys for their place."""
        audio_rows, rotation = self.plan.layout.audio_rows, self.rotations[index]
        if audio_rows is not None:
            key, value = key.index_select(0, audio_rows), value.index_select(0, audio_rows)
        if rotation is not None:
            key = rotate(self.modules[index].self_attn, key, rotation)  # type: ignore[arg-type]
        return key, value
