"""The host side of `lal_attention`: its arguments, what must hold of them, and what computes it."""
