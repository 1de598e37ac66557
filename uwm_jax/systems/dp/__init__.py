"""Diffusion Policy (Chi et al. 2023, arXiv:2303.04137), as the Unified World Models code compares itself with it."""
