"""Inspects an existing dataset: status, explain, verify, leftovers."""
