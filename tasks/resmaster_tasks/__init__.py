"""Prefect tasks: one stage over one shard. Policy only (retries, names); the work is in `resmaster_stages`."""
