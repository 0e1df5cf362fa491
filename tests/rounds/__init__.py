"""One story of a round per file."""
