"""The Prefect flows: what runs, in which order, on which workers. `cli/` holds the command line."""
