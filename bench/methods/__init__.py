"""What is compared: one class for each way of putting audio into a language model, and their registry."""

from palkernels.bench.methods.base import MODES, Batch, Method, Style
from palkernels.bench.methods.registry import DEFAULT_METHODS, LEVERS, METHODS

__all__ = ["DEFAULT_METHODS", "LEVERS", "METHODS", "MODES", "Batch", "Method", "Style"]
