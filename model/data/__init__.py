"""What a model learns from: readers of files, mixtures, batches of like length, and states of frozen encoders.

samples = read("calls.jsonl", max_seconds=30)           # conversations with clips; what is dropped, is listed
collate = Collator(processor, max_tokens=512)
mixture = Mixture([collate.fitting(samples)])
loader = DataLoader(mixture, 8, collate_fn=collate, num_workers=4)
"""

from typing import TYPE_CHECKING

from palkernels import lazy as _lazy

if TYPE_CHECKING:
    from palkernels.model.data.buckets import LengthBuckets
    from palkernels.model.data.collator import Collator
    from palkernels.model.data.decoding import decodable
    from palkernels.model.data.mixture import Mixture
    from palkernels.model.data.reading import read
    from palkernels.model.data.sample import Sample
    from palkernels.model.data.samples import Dropped, Samples
    from palkernels.model.data.sources import Source
    from palkernels.model.data.states import EncodedStates, Prepared

__all__ = [
    "Collator",
    "Dropped",
    "EncodedStates",
    "LengthBuckets",
    "Mixture",
    "Prepared",
    "Sample",
    "Samples",
    "Source",
    "decodable",
    "read",
]

_NAMES_BY_MODULE = {
    "buckets": ("LengthBuckets",),
    "collator": ("Collator",),
    "decoding": ("decodable",),
    "mixture": ("Mixture",),
    "reading": ("read",),
    "sample": ("Sample",),
    "samples": ("Dropped", "Samples"),
    "sources": ("Source",),
    "states": ("EncodedStates", "Prepared"),
}
if not TYPE_CHECKING:
    __getattr__, __dir__ = _lazy.exports(
        __name__, {name: f"{__name__}.{module}" for module, names in _NAMES_BY_MODULE.items() for name in names}
    )
