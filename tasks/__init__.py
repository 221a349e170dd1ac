"""Prefect tasks: one stage over one shard. Policy only (retries, names, tags); the work is in `resmaster_stages`."""
