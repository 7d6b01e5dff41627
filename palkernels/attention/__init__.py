"""The host side of `lal_attention`: what must hold of a call, and the implementations that compute it."""
