"""Gradients clipped per patient: what both engines share, and the one that keeps books instead of gradients."""
