"""The coordinator: trusted to be present, not to be discreet."""
