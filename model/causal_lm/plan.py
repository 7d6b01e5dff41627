"""From the texts of a forward and an :class:`AudioState` to what every layer needs: who reads what, and positions."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from palkernels.model.causal_lm.facts import DeviceFacts
from palkernels.model.causal_lm.packing import Packing
from palkernels.model.causal_lm.state import DECREASES, AudioState, decreases
from palkernels.model.causal_lm.texts import Texts, mask_error


@dataclass(frozen=True)
class AudioLayout:
    """An :class:`AudioState` spelled out for the texts of one forward: which keys and values there are, who reads them.

    Texts may share an audio row but not its place in them. Its keys are then rotated once per place, so that there are
    P rows of keys and values, made of A audio rows. P = A where no text does so.
    """

    audio_rows: Tensor | None  # (P,) the audio row that each row of keys is made of; None: in order
    positions: Tensor  # (P or 1, N) position of each audio token, as if it stood in the text
    lengths: Tensor | None  # (P,) valid audio tokens; None: all N
    index: Tensor | None  # (B,) the row of keys that each text reads; None: in order
    insert_at: Tensor | None  # (B, N) the text's tokens before each audio token; None: 0
    text_lengths: Tensor  # (B,) valid audio tokens of each text

    @classmethod
    def of(cls, state: AudioState, copies: int, *, rotated: bool) -> "AudioLayout":
        """Lay a state out for ``copies`` texts per text of the prompt.

        Args:
            rotated: whether keys take RoPE. They then have a row for each text where texts share audio rows but may
                not share places; :meth:`sharing` makes them fewer.
        """
        device, tokens = state.device, state.num_tokens
        steps = torch.arange(tokens, device=device)
        lengths, index = state.lengths, state.index
        insert_at = None
        if state.insert_at is not None:
            insert_at = state.insert_at.view(state.batch_size, -1).expand(-1, tokens)

        # Token j stands behind insert_at[j] text tokens and j audio tokens.
        audio_rows, positions = None, steps.unsqueeze(0)
        if insert_at is not None:
            positions = insert_at + steps
            if index is not None and rotated:
                audio_rows, index = index, None
                lengths = None if lengths is None else lengths[audio_rows]

        text_lengths = torch.full((state.batch_size,), tokens, device=device)
        if lengths is not None:
            text_lengths = lengths if index is None else lengths[index]
        if copies > 1:
            in_prompt = torch.arange(state.batch_size, device=device) if index is None else index
            index = in_prompt.repeat_interleave(copies)
            text_lengths = text_lengths.repeat_interleave(copies)
            insert_at = None if insert_at is None else insert_at.repeat_interleave(copies, dim=0)
        return cls(audio_rows, positions, lengths, index, insert_at, text_lengths)

    def sharing(self, first_alike: Tensor, count: int) -> "AudioLayout":
        """Give texts that read one audio row at one place one row of keys.

        Args:
            first_alike: (B of the prompt,) the first text with the same audio row and place as each.
            count: how many different ones there are.
        """
        if self.audio_rows is None or count == self.audio_rows.shape[0]:
            return self
        is_first = first_alike == torch.arange(first_alike.shape[0], device=first_alike.device)
        firsts = is_first.int().argsort(descending=True, stable=True)[:count]
        index = (is_first.cumsum(0) - 1)[first_alike]
        return replace(
            self,
            audio_rows=self.audio_rows[firsts],
            positions=self.positions[firsts],
            lengths=None if self.lengths is None else self.lengths[firsts],
            index=index if self.index is None else index[self.index],
        )

    def shift(self, text_index: Tensor) -> Tensor:
        """Return how many audio tokens stand before each text token (B, T), given its place in its own text."""
        lengths = self.text_lengths.unsqueeze(1)
        if self.insert_at is None:
            return lengths.expand_as(text_index)
        before = torch.searchsorted(self.insert_at.contiguous(), text_index.contiguous(), right=True)
        return torch.minimum(before, lengths)


@dataclass(frozen=True, eq=False)
class Plan:
    """What mask and audio say about a batch. Once every text has begun, it holds for later steps of generation, too."""

    layout: AudioLayout
    start: Tensor  # (B,) first valid key
    length: Tensor  # (B,) valid keys
    left_padded: bool  # whether a text is, or may be
    right_padded: bool
    begun: bool  # whether every text has a valid key: the first chunks of a prompt may be all padding
    holes: bool = False  # whether there is padding within a text
    packing: Packing | None = None  # where texts lie that are packed into one row

    @property
    def text_start(self) -> Tensor | None:
        """First valid key (B,); None where no text is padded on the left."""
        return self.start if self.left_padded else None

    def text_index(self, texts: Texts) -> Tensor:
        """Return each query's place in its own text (B, T), negative in left padding; of packed texts (1, T)."""
        if self.packing is not None:
            return self.packing.text_index.unsqueeze(0)
        valid = texts.valid() if self.holes else None
        if valid is not None:
            return texts.of_queries(valid.cumsum(1)) - 1
        steps = torch.arange(texts.num_queries, device=self.start.device)
        return steps + texts.num_cached - self.start.unsqueeze(1)

    def positions(self, texts: Texts, *, shifted: bool) -> Tensor:
        """Return RoPE positions of the texts (B, T), ``shifted`` by the audio that stands before them or not."""
        if self.packing is not None and shifted:
            padded = self.packing.padded_index()
            return self.packing.packed(padded + self.layout.shift(padded))
        text_index = self.text_index(texts).clamp(min=0)
        if self.right_padded and not self.holes:  # what is not a token must not be the longest position
            text_index = torch.minimum(text_index, (self.length - 1).clamp(min=0).unsqueeze(1))
        return text_index + self.layout.shift(text_index) if shifted else text_index


def make_plan(
    state: AudioState,
    texts: Texts,
    *,
    rotated: bool,
    training: bool,
    rope_by_length: bool = False,
    packable: bool = False,
) -> Plan:
    """Check texts and audio against each other, and work out what they mean. Reads values on the device once.

    Args:
        rotated: whether audio keys take RoPE.
        training: whether the model trains, so that the texts are whole.
        rope_by_length: whether RoPE depends on the longest position, which must then be the text's.
        packable: whether the model can run packed texts, for each of which there is audio.

    Raises:
        ValueError: they do not fit each other.
    """
    facts = DeviceFacts()
    layout = AudioLayout.of(state, texts.copies, rotated=rotated)
    packing = None
    if texts.batch != texts.copies * state.batch_size:
        position_ids = _packed_positions(state, texts, rope_by_length=rope_by_length, packable=packable)
        packing = Packing.of(facts, position_ids, state.batch_size)
        start, length = torch.zeros_like(packing.lengths), packing.lengths
    else:
        start, length = _ask_about_mask(facts, texts)
    plan = Plan(layout, start, length, left_padded=texts.mask is not None, right_padded=False, begun=texts.mask is None)

    whole = _whole_lengths(texts, length, training) if packing is None else length
    _ask_about_insertion(facts, state, texts, whole)
    first_alike = None
    if packing is None:
        _ask_about_positions(facts, texts, plan)
        if layout.audio_rows is not None and not torch.compiler.is_compiling():  # how many differ depends on values
            first_alike = _first_alike(state)
            facts.ask("different", (first_alike == torch.arange(state.batch_size, device=state.device)).sum())
    reach = longest = length
    if rope_by_length:
        reach = (length + layout.text_lengths).max() - 1
        longest = replace(plan, right_padded=True).positions(texts, shifted=True).max()
        facts.ask("audio is last", longest < reach)

    known = facts.read()
    if known is None:
        return plan
    _raise_if_wrong(known, state, texts, whole)
    if packing is not None:
        if known["packed texts"] != state.batch_size or known["packed positions differ"]:
            raise _positions_error(texts, known["packed texts"], state)
        return replace(plan, packing=packing.with_longest(known["longest"]))
    if known.get("positions differ"):
        raise _positions_error(texts)
    begun = bool(known.get("begun", True))
    if begun and known.get("audio is last"):
        raise ValueError(
            "audio must stand before the last token of the longest text, since the model's RoPE depends on the "
            f"longest position, got audio up to position {int(reach)} and text up to {int(longest)}"
        )
    if first_alike is not None:
        layout = layout.sharing(first_alike, known["different"])
    left_padded, right_padded = (bool(known.get(f"{side} padded")) for side in ("left", "right"))
    return Plan(layout, start, length, left_padded, right_padded, begun, holes=bool(known.get("holes")))


def check_prompt(state: AudioState, texts: Texts) -> None:
    """Check a prompt that is whole with this forward, where a plan was made of its first chunks.

    Raises:
        ValueError: the prompt is padded on the right, has holes or is empty, or the audio stands behind it.
    """
    facts = DeviceFacts()
    _, length = _ask_about_mask(facts, texts)
    whole = _whole_lengths(texts, length, training=False)
    _ask_about_insertion(facts, state, texts, whole)
    known = facts.read()
    if known is not None:
        _raise_if_wrong(known, state, texts, whole)
        if known.get("holes"):
            raise ValueError(
                "attention_mask must mark one run of tokens per row where a prompt with audio comes in chunks, got a "
                "mask with holes"
            )


def _packed_positions(state: AudioState, texts: Texts, *, rope_by_length: bool, packable: bool) -> Tensor:
    """Return the positions (1, T) of packed texts, one for each row of audio; raise where there can be none."""
    position_ids = texts.position_ids
    rows = f"audio must describe the batch's {texts.batch} text rows, got {state.batch_size}"
    if texts.batch != 1 or not isinstance(position_ids, Tensor) or texts.prompt is not None or texts.copies > 1:
        raise ValueError(rows)
    reasons = {
        "audio must enter by LAL": not packable,
        "attention_mask must be None": texts.mask is not None,
        "past_key_values must be None or empty": not isinstance(texts.num_cached, int) or texts.num_cached > 0,
        "use_cache must not be True": texts.use_cache is True,
        "RoPE must not depend on the longest position": rope_by_length,
        "the forward must not be compiled": torch.compiler.is_compiling(),
        "position_ids must be (1, T)": tuple(position_ids.shape) != (1, texts.num_queries),
        "no text may be empty": state.batch_size > texts.num_queries,
    }
    wrong = [reason for reason, holds in reasons.items() if holds]
    if wrong:
        raise ValueError(f"{rows}; for packed sequences {', '.join(wrong)}")
    return position_ids


def _ask_about_mask(facts: DeviceFacts, texts: Texts) -> tuple[Tensor, Tensor]:
    """Return the first valid key (B,) and the number of valid keys (B,) of each text."""
    width, valid = texts.num_keys, texts.valid()
    if valid is None:
        start = torch.zeros(texts.batch, dtype=torch.long, device=texts.device)
        return start, start + width
    if isinstance(width, Tensor):
        facts.ask("mask is short", width > valid.shape[1])
    length = valid.sum(dim=1)
    # A text without any valid key starts behind its end.
    start = torch.where(length > 0, valid.int().argmax(dim=1), width)
    end = torch.where(length > 0, valid.shape[1] - valid.int().flip(1).argmax(dim=1), width)
    facts.ask("holes", (end - start != length).any())
    facts.ask("left padded", (start > 0).any())
    facts.ask("right padded", (end < width).any())
    facts.ask("begun", (length > 0).all())
    return start, length


def _whole_lengths(texts: Texts, length: Tensor, training: bool) -> Tensor | None:
    """Return the tokens (B of the prompt,) of texts that are whole now; None where more of them may follow."""
    if texts.prompt is not None:
        if texts.mask is None:
            return torch.full_like(length, texts.prompt)[:: texts.copies]
        return (texts.mask[:, : texts.prompt] != 0).sum(dim=1)[:: texts.copies]
    whole = (training or texts.use_cache is False) and texts.copies == 1
    return length if whole else None


def _ask_about_insertion(facts: DeviceFacts, state: AudioState, texts: Texts, whole: Tensor | None) -> None:
    if whole is not None and texts.prompt is not None:
        facts.ask("empty", (whole == 0).any())
    if whole is not None and state.insert_at is not None:
        facts.ask("inserted behind", (_insertion(state) > whole.unsqueeze(1)).any())
    if state.insert_at is not None and not state.checks_values:
        facts.ask("insertion decreases", decreases(_insertion(state)))


def _ask_about_positions(facts: DeviceFacts, texts: Texts, plan: Plan) -> None:
    position_ids = texts.position_ids
    if position_ids is None or torch.compiler.is_compiling():
        return
    shapes = ((1, texts.num_queries), (texts.batch, texts.num_queries))
    if not isinstance(position_ids, Tensor) or tuple(position_ids.shape) not in shapes:
        raise _positions_error(texts)
    valid = texts.valid()
    if valid is None:
        text_index = plan.text_index(texts)
        is_token = torch.ones_like(text_index, dtype=torch.bool)
    else:
        text_index, is_token = texts.of_queries(valid.cumsum(1)) - 1, texts.of_queries(valid)
    facts.ask("positions differ", ((position_ids != text_index) & is_token).any())


def _positions_error(texts: Texts, packed: int | None = None, state: AudioState | None = None) -> ValueError:
    position_ids = texts.position_ids
    got = position_ids.tolist() if isinstance(position_ids, Tensor) else type(position_ids).__name__
    if state is not None:
        return ValueError(
            f"position_ids must count each of {state.batch_size} packed sequences, which audio describes, from 0, got "
            f"{packed} in {got}"
        )
    return ValueError(
        "position_ids must count each row's own text from 0 with audio, (B, T), or each packed sequence of a single "
        f"row, for each of which audio must describe one text, got {got}"
    )


def _raise_if_wrong(known: dict[str, int], state: AudioState, texts: Texts, whole: Tensor | None) -> None:
    """Raise the first thing that is wrong with the mask and with where the audio stands."""
    if known.get("mask is short"):
        raise mask_error(texts.mask, texts.batch, texts.num_cached, texts.num_queries)
    if texts.prompt is not None and known.get("right padded"):
        raise ValueError("generate must be given a prompt without right padding: pad on the left")
    if known.get("empty"):
        raise ValueError("every row of a prompt with audio must hold a token, got a row of padding")
    if known.get("insertion decreases"):
        raise ValueError(DECREASES)
    if whole is not None and known.get("inserted behind"):
        raise ValueError(
            f"insert_at must be at most each text's length {whole.tolist()}, got {_insertion(state).tolist()}"
        )


def _insertion(state: AudioState) -> Tensor:
    """Return where the audio stands, (B, 1) or (B, N)."""
    assert state.insert_at is not None
    return state.insert_at.view(state.batch_size, -1)


def _first_alike(state: AudioState) -> Tensor:
    """Return, for each text (B,), the first one that reads the same audio row at the same place."""
    assert state.index is not None
    pairs = torch.cat([state.index.unsqueeze(1), _insertion(state)], dim=1)
    alike = (pairs.unsqueeze(0) == pairs.unsqueeze(1)).all(dim=2)
    return alike.int().argmax(dim=1)
