"""Unified World Models in JAX, and the systems that they are compared with: robot actions and future video."""

__version__ = "0.1.0"
