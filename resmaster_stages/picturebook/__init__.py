"""The embedded model picturebook: its world of drawn scenes, and its weights."""
