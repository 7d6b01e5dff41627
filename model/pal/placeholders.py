"""Placeholders: which columns of the texts they are, and which of a text's PLITS tokens takes the place of each."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from palkernels.model.pal.clips import Clips

__all__ = ["Placeholders", "infer_index", "mismatch", "place_of", "places_in", "put_in_place"]


@dataclass(frozen=True, eq=False)
class Placeholders:
    """The placeholders of B texts. Columns count from the start of the conversation, cached ones and padding included.

    Columns behind the table are text, whatever they hold: a model may generate the placeholder's token, too.
    """

    table: Tensor  # (B, columns), True at placeholders
    before: Tensor  # (B,) those that stand before the table's first column

    @classmethod
    def following(cls, earlier: "Placeholders | None", start: int, places: Tensor) -> "Placeholders":
        """Return the placeholders of texts whose columns from ``start`` on are ``places`` (B, T), behind earlier ones.

        Args:
            earlier: Those of the columns before, or of more; None: there are none.
        """
        table = places.new_zeros(places.shape[0], start)
        before = torch.zeros(places.shape[0], dtype=torch.long, device=places.device)
        if earlier is not None:
            known = min(start, earlier.table.shape[1])
            table[:, :known] = earlier.table[:, :known]
            before = earlier.before
        return cls(torch.cat([table, places], dim=1), before)

    def counts(self) -> Tensor:
        """Return how many each text has (B,)."""
        return self.before + self.table.sum(dim=1)

    def up_to(self, column: int | Tensor) -> "Placeholders":
        """Return those in front of a column."""
        steps = torch.arange(self.table.shape[1], device=self.table.device)
        return Placeholders(self.table & (steps < column), self.before)

    def completing(self, lengths: Tensor) -> "Placeholders":
        """Return them as the last ones of texts with ``lengths`` (B,) PLITS tokens in all."""
        return Placeholders(self.table, (lengths - self.table.sum(dim=1)).clamp(min=0))

    def rows(self, texts: Tensor) -> "Placeholders":
        """Return those of the texts of the given numbers."""
        texts = texts.to(self.table.device)
        return Placeholders(self.table[texts], self.before[texts])

    def numbers(self) -> Tensor:
        """Return the number of the PLITS token that takes each column's place (B, columns), -1 where it is text."""
        number = self.before.unsqueeze(1) + self.table.cumsum(dim=1) - 1
        return number.masked_fill(~self.table, -1)


def put_in_place(embeds: Tensor, numbers: Tensor, tokens: Tensor) -> Tensor:
    """Return embeddings (B, T, d) in which PLITS tokens have taken the places of placeholders.

    Args:
        embeds: The text's embeddings.
        numbers: The number of the token that takes each place (B, T), -1 where the text stays.
        tokens: Each text's tokens (B, N, d).
    """
    if not tokens.shape[1]:
        return embeds
    tokens, numbers = tokens.to(embeds), numbers.to(embeds.device)
    chosen = numbers.clamp(min=0, max=tokens.shape[1] - 1).unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return torch.where(numbers.unsqueeze(-1) >= 0, tokens.gather(1, chosen), embeds)


def places_in(embedding: nn.Module, token: int, input_ids: Tensor | None, embeds: Tensor | None) -> Tensor | None:
    """Return which columns of texts (B, T) are placeholders; None where there are no texts.

    Args:
        embedding: The language model's. Embeddings that come without ids are compared with the placeholder's.
        token: The placeholder.
        input_ids: (B, T); embeddings of another length do not belong to them.
        embeds: (B, T, d).
    """
    if input_ids is not None and place_of(input_ids, embeds) == "input_ids":
        return torch.eq(input_ids, token)
    if embeds is None:
        return None
    own: Tensor = embedding(torch.tensor([token], device=embeds.device))
    return (embeds == own).all(dim=-1)


def infer_index(counts: list[int], lengths: list[int]) -> list[list[int]] | None:
    """Return the clips that each text hears, dealt out in their order by the texts' placeholders.

    Args:
        counts: Placeholders of each text.
        lengths: PLITS tokens of each clip.

    Returns:
        The clips' numbers by text; None where counts and lengths do not fix them.
    """
    if not all(lengths):
        return None
    index: list[list[int]] = []
    clip = 0
    for count in counts:
        index.append([])
        while count > 0 and clip < len(lengths):
            index[-1].append(clip)
            count -= lengths[clip]
            clip += 1
        if count:
            return None
    return index if clip == len(lengths) else None


def mismatch(token: int | None, tokens: Clips, counts: Tensor, where: str) -> ValueError:
    """Make the error for texts that have not as many placeholders as PLITS tokens."""
    held = "a placeholder" if where == "input_ids" else "the embedding of a placeholder"
    return ValueError(
        f"{where} must hold {held}, token {token}, for each PLITS token, "
        f"{tokens.lengths.tolist()} in the texts, got {counts.tolist()}"
    )


def place_of(input_ids: Tensor | None, embeds: Tensor | None) -> str:
    """Return the argument in which :func:`places_in` looks for placeholders."""
    by_ids = input_ids is not None and (embeds is None or embeds.shape[:2] == input_ids.shape)
    return "input_ids" if by_ids else "inputs_embeds"
