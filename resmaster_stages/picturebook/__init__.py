"""The embedded model: its world and its weights."""
