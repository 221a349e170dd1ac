"""One stage over one shard, from verified inputs to one commit. Knows stages by name only."""
