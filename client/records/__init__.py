"""Data on disk to validated tensors; patient ids stay here."""
