"""The control service, both halves of what is said: its messages, and calling it."""
