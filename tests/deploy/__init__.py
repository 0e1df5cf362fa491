"""Tests of deploy/: units, bundles, an installation in a fresh system, containers, chart, monitoring, site."""
