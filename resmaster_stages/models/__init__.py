"""Loads models: from a model's name to its loaded parts."""
