"""From checkpoints to a whole audio LLM: the language model, its tokenizer, the encoders."""

from palkernels.model.building.whole import assemble, build

__all__ = ["assemble", "build"]
