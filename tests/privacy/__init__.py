"""Noise, clipping and accountants against published values."""
