"""The study: how fast each method learns from generated sound."""
