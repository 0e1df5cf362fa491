"""Tests of the hospital."""
