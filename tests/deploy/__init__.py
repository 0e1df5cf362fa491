"""Tests of deploy/: units, bundles, and an installation in a fresh system."""
