"""The work itself: prompts -> low-resolution images -> patch captions -> high-resolution images -> quality.

This package knows nothing about Prefect: every stage is a plain function over one shard and can be called from a script.
"""
