"""Mechanisms, accounting and the ledger."""
