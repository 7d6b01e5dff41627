"""Evaluation: what a model answers, compared with what it should have said."""
