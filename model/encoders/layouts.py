"""What a checkpoint holds instead of the encoder that was asked for, and what to do with it: for errors.

It is told from the model type in its config.json, or from its tensors' names, with or without those of a tower around
them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["CLAP", "SSLAM", "WHISPER", "files_in", "layout_advice", "model_type_advice"]

# What errors call the encoders that a tower reads.
WHISPER, CLAP, SSLAM = "a Whisper encoder", "a CLAP audio encoder", "an SSLAM encoder"
NO_TOWER = "which no tower reads"
FILES_LISTED = 3  # names of files that an error spells out; it counts the others

READERS = {
    "whisper": "which WhisperTower reads",
    "clap": "which ClapTower reads",
    "clap_audio_model": "which ClapTower reads",
    "eat": "which SslamTower reads",
    "pal": "which PalForConditionalGeneration.from_pretrained reads, its audio_tower included",
}

# Names by which a layout is known, what it is, and what to do. The first that fits counts.
LAYOUTS = (
    (r"^audio_tower\.\d+\.encoder\.", "a whole audio LLM", READERS["pal"]),
    (r"\.lora_[AB]\.", "adapters of peft", "which merge_and_unload() must merge before a model is saved"),
    (r"(^|\.)audio_branch\.", "LAION's own CLAP", "of which ClapTower reads transformers' port"),
    (r"(^|\.)blocks\.\d+\.attn\.query\.", "OpenAI's own Whisper", "of which WhisperTower reads transformers' port"),
    (r"^audio_spectrogram_transformer\.|\.distillation_token$", "transformers' AST", f"another network, {NO_TOWER}"),
    (r"feature_extractor\.conv_layers\.", "wav2vec 2.0 or one like it", NO_TOWER),
    (r"(^|\.)audio_encoder\.patch_embed\.", CLAP, READERS["clap"]),
    (r"(^|\.)(encoder\.|^)(conv1\.|embed_positions\.)", WHISPER, READERS["whisper"]),
    (r"(^|\.)(extra_tokens$|local_encoder\.)", SSLAM, READERS["eat"]),
    (r"(^|\.)cls_token$", "another vision transformer", NO_TOWER),
)


def model_type_advice(model_type: object) -> str:
    """Return what follows in an error that names a model type: what reads such a model."""
    return f", {READERS.get(model_type, NO_TOWER)}" if isinstance(model_type, str) else ""


def layout_advice(names: Iterable[str], expected: str) -> str:
    """Return what follows in an error about tensors of these names: whose they are and what reads them.

    It is empty where they are those of the ``expected`` encoder, as far as names tell, or of no known layout.
    """
    names = list(names)
    for pattern, layout, advice in LAYOUTS:
        if any(re.search(pattern, name) for name in names):
            return "" if layout == expected else f"; they are those of {layout}, {advice}"
    return ""


def files_in(directory: Path) -> str:
    """Return the names of a directory's first files, and how many more there are."""
    names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    listed = ", ".join(names[:FILES_LISTED]) or "no files"
    return listed + (f" and {len(names) - FILES_LISTED} more" if len(names) > FILES_LISTED else "")
