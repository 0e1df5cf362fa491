"""Tests of deploy/: containers, chart, monitoring, site."""
