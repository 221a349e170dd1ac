"""Prefect tasks: one stage over one shard. Holds only policy (retries, names); `resmaster_stages` does the work.

Every process of the pipeline that computes imports this package before torch: the command line, a worker's flow runs,
and the workers of a Dask or Ray cluster. So the package sets the environment that libraries read when they are loaded.
`resmaster_stages`, which is also a library for other programs, changes no environment.
"""

import os

ENVIRONMENT = {
    # Two threads that spin while they wait are many times slower than one where cores are shared.
    "OMP_WAIT_POLICY": "PASSIVE",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}
"""Variables and their values in every process. Values that the user has set stay."""

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
