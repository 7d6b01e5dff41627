"""What one forward with audio hands to the layers: audio keys and values, and what each text sees."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from palkernels import quantize_audio_kv
from palkernels.model.causal_lm.fast_path import project_fused
from palkernels.model.causal_lm.layers import AudioKV, Rotation, project_audio, rotate
from palkernels.model.causal_lm.packing import Packing
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
    # By layer index, K and V that are made already, and their scales in eight bits; None: none are kept.
    cached: dict[int, tuple[Tensor, ...]] | None
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

    def audio_kv(self, index: int) -> tuple[Tensor, ...]:
        """Return K and V of the audio in one layer, and their scales where they are kept in eight bits."""
        if self.cached is not None and index in self.cached:
            return self.cached[index]
        projected = self.project(index)
        if self.cached is None:
            return projected
        kept = self.cached[index] = self.as_kept(projected)
        return kept

    def as_kept(self, projected: AudioKV) -> tuple[Tensor, ...]:
        """Return K and V as they are kept in ``cached``."""
        return projected

    def states_of(self, index: int) -> Tensor:
        """Return the states (A, N, d) that one layer takes."""
        states = self.state.for_layer(index)
        if states is None:
            raise ValueError(f"states must hold a tensor for layer {index}, which takes audio, got None")
        return states


@dataclass(frozen=True, eq=False)
class KeySpan:
    """What the texts see in layers that have equally many text keys."""

    keywords: dict[str, Any]  # of lal_attention: who reads which audio, which keys are valid, what runs
    order: "Order | None" = None  # where there is padding within a text: with it, padding comes first


@dataclass(frozen=True, eq=False)
class Order:
    """Keys and queries of each text in an order in which padding comes first, and tokens as they were.

    So a row has one run of tokens at its end, the queries' among them, and is computed as it would be alone.
    """

    keys: Tensor  # (B, S)
    queries: Tensor  # (B, T)

    @classmethod
    def of(cls, valid: Tensor, valid_queries: Tensor) -> "Order":
        """Return the order by which keys (B, S) and which queries (B, T) are tokens."""
        return cls(*(mask.int().argsort(dim=1, stable=True) for mask in (valid, valid_queries)))

    @staticmethod
    def ordered(tensor: Tensor, order: Tensor) -> Tensor:
        """Return (B, H, S, D) with S in another order."""
        return tensor.gather(2, order[:, None, :, None].expand_as(tensor))

    def as_they_were(self, out: Tensor) -> Tensor:
        """Return the queries' results (B, H, T, D) in their own order."""
        return self.ordered(out, self.queries.argsort(dim=1))


@dataclass(frozen=True, eq=False)
class PackedSpan:
    """How packed texts read audio rows that lie one after another; as lal_attention_varlen takes it."""

    cu_seqlens: Tensor  # (B + 1,)
    cu_audio: Tensor  # (P + 1,)
    max_seqlen: int
    max_audio: int
    audio_index: Tensor | None  # (B,)
    audio_visible_from: Tensor | None  # (P * N,)


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
    in_eight_bits: bool  # whether K and V that are kept are float8_e4m3fn
    spans: dict[int, KeySpan] = field(default_factory=dict, init=False)  # by the length of a layer's keys
    _whole: KeySpan | None = field(default=None, init=False)  # of layers that have all keys so far, in every step
    _packed_spans: dict[bool, PackedSpan] = field(default_factory=dict, init=False)  # by whether it is without audio

    def positions(self) -> Tensor:
        return self.plan.positions(self.texts, shifted=self.shifted)

    def following(self, texts: Texts) -> Self:
        request = super().following(texts)
        request._whole = self._whole
        return request

    def key_span(self, room: int) -> KeySpan:
        """Return what is seen in a layer whose keys are (B, Hkv, room, D), and keep it in ``spans``: once per forward
        and room.

        Layers differ in it: a sliding-window cache has dropped the oldest keys, a preallocated one is longer than they
        are. Positions count from the first key that is left. Where that is the first of all, as in a cache that grows,
        every step of generation has the same.
        """
        if torch.compiler.is_compiling():  # the compiler computes it once anyway, and must not have to keep it
            return self._key_span(room)
        if self.plan.holes or isinstance(self.texts.num_keys, Tensor) or self.texts.num_keys != room:
            span = self._key_span(room)
        else:
            span = self._whole = self._whole or self._key_span(room)
        self.spans[room] = span
        return span

    def _key_span(self, room: int) -> KeySpan:
        if self.plan.holes:
            return self._key_span_with_holes(room)
        num_keys, text_start, text_end = self.texts.num_keys, self.plan.text_start, None
        visible_from = self.plan.layout.insert_at
        dropped: int | Tensor | None = None
        if isinstance(num_keys, Tensor):
            dropped = (num_keys - room).clamp(min=0)
            text_end = num_keys.expand(self.texts.batch).clamp(max=room)
        elif num_keys > room:
            dropped = num_keys - room
        elif num_keys < room:
            self.texts.check_room(room)
            text_end = torch.full((self.texts.batch,), num_keys, device=self.texts.device)
        if visible_from is not None and text_start is not None:
            visible_from = visible_from + text_start.unsqueeze(1)
        if dropped is not None:
            visible_from = None if visible_from is None else visible_from - dropped
            text_start = None if text_start is None else (text_start - dropped).clamp(min=0)
        return self._span(text_start, text_end, visible_from)

    def _span(
        self,
        text_start: Tensor | None,
        text_end: Tensor | None,
        visible_from: Tensor | None,
        order: Order | None = None,
    ) -> KeySpan:
        layout = self.plan.layout
        keywords = {
            "audio_lengths": layout.lengths,
            "audio_index": layout.index,
            "audio_visible_from": visible_from,
            "text_start": text_start,
            "text_end": text_end,
            "impl": self.impl,
        }
        return KeySpan(keywords, order)

    def _key_span_with_holes(self, room: int) -> KeySpan:
        valid, insert_at = cast(Tensor, self.texts.valid()), self.plan.layout.insert_at
        order = Order.of(pad(valid[:, :room], (0, max(room - valid.shape[1], 0))), self.texts.of_queries(valid))
        text_start = room - valid.sum(dim=1)
        visible_from = None if insert_at is None else insert_at + text_start.unsqueeze(1)
        return self._span(text_start, None, visible_from, order)

    def packed_span(self, without_audio: bool = False) -> PackedSpan:
        """Return what lies where in packed texts and their audio, or in texts without audio: made once per forward."""
        if without_audio not in self._packed_spans:
            packing = cast(Packing, self.plan.packing)
            if without_audio:
                span = PackedSpan(
                    packing.cu_seqlens, torch.zeros_like(packing.cu_seqlens), packing.longest, 0, None, None
                )
            else:
                span = self._make_packed_span(packing)
            self._packed_spans[without_audio] = span
        return self._packed_spans[without_audio]

    def _make_packed_span(self, packing: Packing) -> PackedSpan:
        layout, tokens = self.plan.layout, self.state.num_tokens
        index, visible_from = layout.index, None
        if layout.lengths is not None or layout.insert_at is not None:
            # Each text has a row of keys of its own; its padding is seen from behind the text's end on.
            texts, index = packing.lengths.shape[0], None
            is_token = torch.arange(tokens, device=packing.lengths.device) < layout.text_lengths.unsqueeze(1)
            visible_from = torch.zeros_like(is_token, dtype=torch.int64)
            if layout.insert_at is not None:
                visible_from = layout.insert_at
            visible_from = torch.where(is_token, visible_from, packing.longest).flatten()
        else:
            texts = self.state.num_rows
        cu_audio = torch.arange(texts + 1, device=packing.lengths.device) * tokens
        return PackedSpan(packing.cu_seqlens, cu_audio, packing.longest, tokens, index, visible_from)

    def packed_audio_kv(self, index: int, text_key: Tensor) -> AudioKV:
        """Return K and V of the audio in one layer, rows one after another: (P * N, Hkv, D).

        A layer that sees no audio gets no rows, like its text's keys (T, Hkv, D).
        """
        if index not in self.selected:
            return text_key[:0], text_key[:0]
        rows = self.plan.layout.index if self.packed_span().audio_visible_from is not None else None
        key, value = (x if rows is None else x.index_select(0, rows) for x in self.audio_kv(index))
        return key.transpose(1, 2).flatten(0, 1), value.transpose(1, 2).flatten(0, 1)

    def project(self, index: int) -> AudioKV:
        if self.norm_offset is None:
            projected = project_audio(self.modules[index], self._unpadded(index))
            return self._placed(index, *self._padded(projected))
        return self._project_fused([index], self.norm_offset)[index]

    def as_kept(self, projected: AudioKV) -> tuple[Tensor, ...]:
        if not self.in_eight_bits:
            return projected
        return quantize_audio_kv(*projected, audio_lengths=self.plan.layout.lengths)

    def project_at_once(self) -> None:
        """Make every layer's K and V before the first layer runs, if that is possible and pays.

        With gradients it does not: each layer's are then made where they are used. Nor does it where they are kept in
        eight bits: all layers' would be there in 16 at once. Layers that share their states are projected in one call.
        """
        if self.norm_offset is None or torch.is_grad_enabled() or (self.in_eight_bits and self.cached is not None):
            return
        shared = isinstance(self.state.states, Tensor)
        groups = [self.selected] if shared else [(index,) for index in self.selected]
        made: dict[int, tuple[Tensor, ...]] = {} if self.cached is None else self.cached
        for group in groups:
            made.update(self._project_fused(group, self.norm_offset))
        self.cached = made

    def _project_fused(self, indices: Sequence[int], norm_offset: float) -> dict[int, AudioKV]:
        """Make K and V of plain layers that share their states, by one audio_kv.

        For the backward pass it keeps its arguments alone, where the modules keep several times as much as K and V.
        """
        rotated_later = self.plan.layout.audio_rows is not None
        rotations = [None if rotated_later else self.rotations[index] for index in indices]
        if self.plan.valid_audio is not None:
            rotations = [None if x is None else self.plan.valid_audio.pack_rotation(x) for x in rotations]
        modules = [self.modules[index] for index in indices]
        projected = project_fused(modules, self._unpadded(indices[0]), norm_offset, rotations, self.impl)
        projected = [self._padded(kv) for kv in projected]
        if rotated_later:
            projected = [self._placed(index, *kv) for index, kv in zip(indices, projected, strict=True)]
        return dict(zip(indices, projected, strict=True))

    def _unpadded(self, index: int) -> Tensor:
        """Return the states that one layer takes, as (1, M, d) without padding where that pays."""
        states, valid = self.states_of(index), self.plan.valid_audio
        return states if valid is None else valid.pack(states)

    def _padded(self, projected: AudioKV) -> AudioKV:
        """Return K and V of :meth:`_unpadded` states with the padding put back."""
        return projected if self.plan.valid_audio is None else self.plan.valid_audio.unpack(projected)

    def _placed(self, index: int, key: Tensor, value: Tensor) -> AudioKV:
        """Turn K and V of each audio row into those of each audio row and place, and rotate keys for their place."""
        audio_rows, rotation = self.plan.layout.audio_rows, self.rotations[index]
        if audio_rows is not None:
            key, value = key.index_select(0, audio_rows), value.index_select(0, audio_rows)
        if rotation is not None:
            key = rotate(self.modules[index].self_attn, key, rotation)  # type: ignore[arg-type]
        return key, value
