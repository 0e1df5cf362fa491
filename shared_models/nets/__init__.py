"""The shared networks, free of batch normalisation."""
