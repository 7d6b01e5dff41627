"""palkernels: attention kernels that let audio into a language model as keys and values (LAL).

This package needs torch only. ``palkernels.model`` plugs it into Hugging Face models, ``palkernels.bench`` measures.

Importing it imports nothing, not even torch: each public name is imported when it is first asked for, and with the
first function come the operators, ``torch.ops.palkernels``.
"""

from typing import TYPE_CHECKING

from palkernels import flop_counter, lazy

if TYPE_CHECKING:
    from palkernels import reference
    from palkernels.api import audio_kv, lal_attention, lal_attention_varlen
    from palkernels.quantization import quantize_audio_kv
    from palkernels.reasons import unsupported_reasons
else:
    __getattr__, __dir__ = lazy.exports(
        __name__,
        {
            "audio_kv": "palkernels.api",
            "lal_attention": "palkernels.api",
            "lal_attention_varlen": "palkernels.api",
            "quantize_audio_kv": "palkernels.quantization",
            "reference": "palkernels.reference",
            "unsupported_reasons": "palkernels.reasons",
        },
    )

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "audio_kv",
    "lal_attention",
    "lal_attention_varlen",
    "quantize_audio_kv",
    "reference",
    "unsupported_reasons",
]

flop_counter.register()
