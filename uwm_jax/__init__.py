"""Unified World Models in JAX: one diffusion transformer over robot actions and future video."""

__version__ = "0.1.0"
