"""Tests of what several benchmarks rest on."""
