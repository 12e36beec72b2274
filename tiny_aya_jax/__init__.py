"""Tiny Aya in JAX: pretraining, posttraining and export of a multilingual model in 70 languages."""
