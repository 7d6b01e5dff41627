"""The settings of :func:`~palkernels.model.causal_lm.attach.attach`."""

from collections.abc import Iterable
from dataclasses import dataclass

from palkernels.dispatch import check_impl
from palkernels.dtypes import EIGHT_BITS_NAME


@dataclass(frozen=True)
class LalConfig:
    """How audio enters the model.

    Args:
        layers: "all", or the indices of the layers that see audio. Delayed LAL is ``range(4, num_layers)``. With no
            layer audio is taken and heard by nobody, of which :func:`attach` warns.
        rope: "sequence" gives audio keys the positions they would have if the audio stood in the text, and shifts
            the text behind it. "none" leaves audio keys as projected and text positions as they are. The paper does
            not say which it uses; the default follows its closest public relatives.
        impl: the implementation of :func:`palkernels.lal_attention` and :func:`palkernels.audio_kv`.
        recompute_audio_kv: in training, keep no audio keys and values for the backward pass but project them again
            there, through the same modules. This saves 2 x Hkv x D numbers per audio token and layer, and more where
            adapters keep tensors of theirs.
        audio_kv_dtype: what ``generate`` keeps audio keys and values in; None: as they are made. "float8_e4m3fn" takes
            half the memory of 16 bits, with a scale for each audio row and K/V head: for hours of sound. The prompt
            attends to them too. docs/kernels.md says how far that is off. A forward without ``generate``, as in
            training, keeps none and is not affected.

    Raises:
        TypeError, ValueError: a setting is not one of these.
    """

    layers: str | Iterable[int] = "all"
    rope: str = "sequence"
    impl: str = "auto"
    recompute_audio_kv: bool = False
    audio_kv_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.layers != "all":
            if isinstance(self.layers, str) or not isinstance(self.layers, Iterable):
                raise ValueError(f'layers must be "all" or layer indices, got {self.layers!r}')
            layers = tuple(self.layers)
            if any(isinstance(x, bool) or not isinstance(x, int) for x in layers) or len(set(layers)) < len(layers):
                raise ValueError(f"layers must be distinct integers, got {layers}")
            object.__setattr__(self, "layers", tuple(sorted(layers)))
        if self.rope not in ("sequence", "none"):
            raise ValueError(f'rope must be "sequence" or "none", got {self.rope!r}')
        check_impl(self.impl)
        if not isinstance(self.recompute_audio_kv, bool):
            raise TypeError(f"recompute_audio_kv must be a bool, got {self.recompute_audio_kv!r}")
        if self.audio_kv_dtype not in (None, EIGHT_BITS_NAME):
            raise ValueError(f'audio_kv_dtype must be None or "{EIGHT_BITS_NAME}", got {self.audio_kv_dtype!r}')

    def selected(self, num_layers: int) -> tuple[int, ...]:
        """Return the indices of the layers that see audio in a model of ``num_layers``.

        Raises:
            ValueError: the model has no such layer.
        """
        if isinstance(self.layers, str):
            return tuple(range(num_layers))
        selected = tuple(self.layers)
        if not set(selected) <= set(range(num_layers)):
            raise ValueError(f"layers must be from 0 to {num_layers - 1}, got {selected}")
        return selected
