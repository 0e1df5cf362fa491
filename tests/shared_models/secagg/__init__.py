"""Of shared_models/secagg/: the sum is exact, one vector is noise, and every attack is refused by name."""
