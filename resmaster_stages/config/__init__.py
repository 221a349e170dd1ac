"""The configuration of a dataset, as a user writes it."""
