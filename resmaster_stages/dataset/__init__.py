"""The contract of a dataset: layout, stages, schemas, plan, commits, reading, samples."""
