"""What a plan makes of texts that share audio: one row of keys for each audio row and place in a text."""

import pytest
import torch

from palkernels.model import AudioState
from palkernels.model.causal_lm.plan import make_plan
from palkernels.model.causal_lm.texts import Texts


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("several", [False, True], ids=["one place", "a place per token"])
def test_texts_that_share_a_clip_and_its_place_share_its_keys(copies, several):
    index, insert_at = torch.tensor([1, 0, 1, 1, 0]), torch.tensor([2, 2, 2, 3, 2])
    places = torch.stack([insert_at, insert_at + 1, insert_at + 1], dim=1)
    lengths = torch.tensor([3, 2])
    state = AudioState(torch.zeros(2, 3, 8), lengths, index, places if several else insert_at)
    texts = Texts.of({"input_ids": torch.zeros(5 * copies, 4, dtype=torch.long)}, copies)
    layout = make_plan(state, texts, rotated=True, training=False).layout
    assert layout.positions.shape == (3, 3)
    assert layout.index.shape == (5 * copies,)
    want = places if several else insert_at.unsqueeze(1)
    for text, keys in enumerate(layout.index):
        assert layout.audio_rows[keys] == index[text // copies]
        assert layout.lengths[keys] == layout.text_lengths[text] == lengths[index[text // copies]]
        assert torch.equal(layout.positions[keys], want[text // copies] + torch.arange(3))


def test_keys_that_are_not_rotated_have_a_row_per_audio_row():
    index, insert_at = torch.tensor([1, 0, 1]), torch.tensor([2, 3, 4])
    texts = Texts.of({"input_ids": torch.zeros(3, 4, dtype=torch.long)})
    state = AudioState(torch.zeros(2, 3, 8), None, index, insert_at)
    layout = make_plan(state, texts, rotated=False, training=False).layout
    assert layout.audio_rows is None
    assert torch.equal(layout.index, index)
