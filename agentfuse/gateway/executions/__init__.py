"""Executions: their records in the store, and their lives on this host."""
