"""palkernels: attention kernels that let audio into a language model as keys and values (LAL).

This package needs torch only. ``palkernels.model`` plugs it into Hugging Face models, ``palkernels.bench`` measures.
"""

from palkernels import reference
from palkernels.api import audio_kv, lal_attention, lal_attention_varlen, unsupported_reasons

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "audio_kv",
    "lal_attention",
    "lal_attention_varlen",
    "reference",
    "unsupported_reasons",
]
