"""Training: from a recipe and samples to a trained audio LLM, by transformers' Trainer."""
