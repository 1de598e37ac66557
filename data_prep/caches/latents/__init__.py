"""Latents of a frozen codec."""
