"""The Triton code. Nothing here is imported before a Triton kernel is asked for."""
