"""Runs one stage over one shard, from verified inputs to one commit. These modules do not import the stages."""
