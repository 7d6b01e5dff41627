"""The host side of `audio_kv`: its arguments, what must hold of them, and what computes it."""
