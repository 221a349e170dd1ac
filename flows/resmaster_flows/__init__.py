"""The Prefect flows: what runs, in which order, on which workers. `cli/` holds the command line."""

import resmaster_tasks  # noqa: F401  # first of all: it sets the environment that libraries read
