"""Builds the same samples by several methods and measures them together."""
