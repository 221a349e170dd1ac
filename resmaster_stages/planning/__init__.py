"""Before anything runs: what would be done, and what it would cost."""
