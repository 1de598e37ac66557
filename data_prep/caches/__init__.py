"""Sidecars of a dataset: latents, embedded instructions, ranges."""
