"""The data contract: layout of a dataset, table of stages, schemas, plan, commits, reading, samples."""
