"""What a caller says about audio that has not passed the connector yet."""

from dataclasses import dataclass

from torch import Tensor

from palkernels.model.causal_lm.moving import Movable


@dataclass(frozen=True, eq=False)
class EncodedAudio(Movable):
    """An encoder's states for one batch of texts, given as ``audio=`` to a model that has a connector from ``attach``.

    ``forward`` and ``generate`` send it through the connector, as ``handle.state`` does, which takes the same
    arguments. So a data collator can make it, and what wraps the model (DDP, FSDP2) sees the connector run within.

    Args:
        encoded: (A, N, input size), or a tuple of them where a connector of ours joins several encoders.
        lengths: (A,) valid states of the encoder, of several those of the first; None: all.
        index, insert_at: as in AudioState.
    """

    encoded: Tensor | tuple[Tensor, ...]
    lengths: Tensor | None = None
    index: Tensor | None = None
    insert_at: Tensor | None = None
