"""The texts of one forward: what its arguments say besides the audio."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from palkernels.model.causal_lm.caches import cache_of


@dataclass(frozen=True, eq=False)
class Texts:
    """B texts of T new tokens each, behind those that are cached already. Made once per forward."""

    batch: int  # B
    num_queries: int  # T
    num_cached: int | Tensor  # text keys in the cache; a tensor on ``device`` where the cache counts there
    device: torch.device
    mask: Tensor | None  # (B, keys so far, or more where the cache is preallocated), not 0 where there is a token
    position_ids: object  # as given; None: none were
    use_cache: object  # as given; False: the caller asks for no cache, so that no text can follow
    output_attentions: bool  # whether the caller asks for attention weights
    copies: int  # texts that follow each other for every text of the prompt (beams, returned sequences)
    prompt: int | None  # the prompt's columns, where this forward completes the prompt of a generate call
    grows: bool  # whether there is no cache, or one that holds no more keys than it counts

    @classmethod
    def of(cls, arguments: Mapping[str, Any], copies: int = 1, prompt: int | None = None) -> "Texts":
        """Gather the texts of a forward from its arguments by name.

        Raises:
            ValueError: there are no texts, or the mask is not theirs.
        """
        inputs = inputs_of(arguments)
        batch, num_queries = inputs.shape[:2]
        cache = cache_of(arguments)
        num_cached = count_cached(cache, inputs.device)
        mask = arguments.get("attention_mask")
        if mask is not None:
            _check_mask(mask, batch, num_cached, num_queries)
        return cls(
            batch,
            num_queries,
            num_cached,
            inputs.device,
            mask,
            position_ids=arguments.get("position_ids"),
            use_cache=arguments.get("use_cache"),
            output_attentions=bool(arguments.get("output_attentions")),
            copies=copies,
            prompt=prompt,
            grows=cache is None or isinstance(cache, DynamicCache),
        )

    @property
    def num_keys(self) -> int | Tensor:
        """Text keys once this forward's are cached, too."""
        return self.num_cached + self.num_queries

    def check_room(self, room: int) -> None:
        """Check that a layer with keys (B, Hkv, room, D), more than there are text keys, has a preallocated cache.

        Raises:
            RuntimeError: its keys come from a cache that was not found among the arguments.
        """
        if self.grows:
            raise RuntimeError(
                f"a layer must have the {self.num_keys} text keys that the forward's arguments tell of, got {room}: "
                "the cache is not where it is looked for in this version of transformers"
            )

    def valid(self) -> Tensor | None:
        """Return which keys so far are tokens, bool (B, keys or more); None: all."""
        if self.mask is None:
            return None
        valid = self.mask != 0
        if isinstance(self.num_keys, Tensor):  # the cache is preallocated, and the mask may be as long
            valid = valid & (torch.arange(valid.shape[1], device=valid.device) < self.num_keys)
        return valid

    def of_queries(self, of_keys: Tensor) -> Tensor:
        """Return the new texts' part (B, T) of what there is for every key."""
        if isinstance(self.num_cached, int):
            return of_keys[:, self.num_cached : self.num_cached + self.num_queries]
        columns = torch.arange(self.num_queries, device=of_keys.device) + self.num_cached
        return of_keys.index_select(1, columns)


def inputs_of(arguments: Mapping[str, Any]) -> Tensor:
    """Return a forward's texts, input_ids (B, T) or inputs_embeds (B, T, d)."""
    ids = arguments.get("input_ids")
    inputs: Tensor | None = arguments.get("inputs_embeds") if ids is None else ids
    if inputs is None:
        raise ValueError("a forward with audio must be given input_ids or inputs_embeds, got neither")
    if inputs.ndim < 2 or 0 in inputs.shape[:2]:
        raise ValueError(
            f"a forward with audio must be given texts (B, T), B and T >= 1, got shape {tuple(inputs.shape)}"
        )
    return inputs


def count_cached(cache: Any, device: torch.device) -> int | Tensor:
    """Return the text keys in a cache: a tensor on ``device`` where a compiled step must not depend on their number."""
    if cache is None:
        return 0
    count: int | Tensor = cache.get_seq_length()
    if getattr(cache, "is_compileable", False):
        return torch.as_tensor(count, device=device) + 0  # not the cache's own counter, which moves on
    return int(count)


def _check_mask(mask: object, batch: int, num_cached: int | Tensor, num_queries: int) -> None:
    fits = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == batch
    if fits and isinstance(num_cached, int):
        fits = mask.shape[1] == num_cached + num_queries  # type: ignore[attr-defined]
    if not fits:
        raise mask_error(mask, batch, num_cached, num_queries)


def mask_error(mask: object, batch: int, num_cached: int | Tensor, num_queries: int) -> ValueError:
    """Make the error for a mask that is not 2-D or not as wide as the keys, whose number it reads."""
    got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    wanted = batch, int(num_cached) + num_queries
    return ValueError(f"attention_mask must be 2-D with audio, (B, past + T) = {wanted}, got {got}")
