"""The third user: trusts nobody, needs no torch and no network."""
