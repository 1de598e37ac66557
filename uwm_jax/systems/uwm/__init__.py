"""The Unified World Model (Zhu et al., RSS 2025, arXiv 2504.02792)."""
