"""The host side of `audio_kv`: what must hold of its arguments, and the implementations that compute it."""
