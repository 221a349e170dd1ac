"""Prefect tasks: one stage over one shard. Holds only policy (retries, names); `resmaster_stages` does the work."""
