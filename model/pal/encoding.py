"""The part of an audio LLM that encodes: clips through encoders and connectors, without any text."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from palkernels.model.connectors.base import Connector
from palkernels.model.encoders.base import Tower
from palkernels.model.pal.clips import AudioFeatures, Clips, join, summaries
from palkernels.model.pal.configuration_pal import PalConfig
from palkernels.model.pal.inputs import checked_encoder_states, lengths_by_tower, tensors_of
from palkernels.model.pal.parts import by_entry, connect, without_padding
from palkernels.model.pal.windows import encode, join_windows, window_lengths, windows_of

__all__ = ["Encoding"]


class Encoding:
    """Mixed into whatever has a config's towers and connectors, whichever library its language model comes from."""

    config: PalConfig
    audio_tower: nn.ModuleList
    multi_modal_projector: nn.ModuleList

    def get_audio_features(
        self,
        input_features: Tensor | Sequence[Tensor] | None = None,
        audio_lengths: Tensor | None = None,
        *,
        encoder_states: Tensor | Sequence[Tensor] | None = None,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Any:
        """Pass clips through encoders and connectors. The arguments are those of ``forward``.

        Args:
            return_dict: False: a tuple of what there is, which ``forward`` does not take.
            output_hidden_states: Whether the states of every encoder are returned, too.

        Returns:
            AudioFeatures of tokens (C, N, d). N depends on encoder and connector; the tokens of a clip's windows are
            joined, and those of several encoders clip by clip.

        Raises:
            TypeError, ValueError: there is not a tensor for every tower, or one of another shape, or the lengths have
                another shape.
        """
        encoded = self._encoded(input_features, encoder_states)
        windows = windows_of(self.config.encoders, [tower.features for tower in self._towers()])
        split = [
            (None, None) if valid is None else window_lengths(valid, window, states.shape[0])
            for valid, window, states in zip(lengths_by_tower(audio_lengths, encoded), windows, encoded, strict=True)
        ]
        cut = without_padding(self.config.encoders, encoded, [lengths for lengths, _ in split])
        entries = by_entry(self.config.encoders, list(zip(cut, split, strict=True)))
        connected: list[Clips] = []
        by_integration: dict[str, list[Clips]] = {}
        for connector, (entry, of_towers) in zip(self.multi_modal_projector, entries, strict=True):
            lengths, counts = of_towers[0][1]
            of_windows = connect(cast(Connector, connector), [states for states, _ in of_towers], lengths)
            clips = join_windows(of_windows, counts)
            connected.append(clips)
            by_integration.setdefault(entry["integration"], []).append(clips)
        if self.config.summary_tokens:
            by_integration["plits"] = [summaries(by_integration["lal"][0], self.config.summary_tokens)]
        outputs = AudioFeatures(
            last_hidden_state=encoded[0],
            pooler_output=connected[0].states,
            hidden_states=tuple(encoded) if output_hidden_states else None,
            **{integration: join(parts)[0] for integration, parts in by_integration.items()},
        )
        return outputs.to_tuple() if return_dict is False else outputs

    def _encoded(
        self, input_features: Tensor | Sequence[Tensor] | None, encoder_states: Tensor | Sequence[Tensor] | None
    ) -> list[Tensor]:
        """Return the states (W, N, width) of every tower, which runs unless they are given."""
        if (input_features is None) == (encoder_states is None):
            got = "neither" if input_features is None else "both"
            raise ValueError(f"audio must be input_features or encoder_states, got {got}")
        towers = self._towers()
        if encoder_states is not None:
            windows = [(tower.features.num_states, tower.hidden_size) for tower in towers]
            if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.audio_tower.parameters()):
                raise ValueError("encoder_states must come of encoders that do not train, got some that do")
            return checked_encoder_states(encoder_states, windows)
        features = tensors_of(input_features)
        if len(features) != len(towers):
            raise ValueError(f"input_features must hold a tensor for each of {len(towers)} towers, got {len(features)}")
        most = self.config.encoder_batch
        return [encode(tower, windows, most) for tower, windows in zip(towers, features, strict=True)]

    def _towers(self) -> list[Tower]:
        return [cast(Tower, tower) for tower in self.audio_tower]
