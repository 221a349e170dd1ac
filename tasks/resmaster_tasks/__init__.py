"""Prefect tasks: one stage over one shard. Holds only policy (retries, names); `resmaster_stages` does the work.

Every process of the pipeline that computes imports this package before torch: the command line, a worker's flow runs,
and the workers of a Dask or Ray cluster. So the package sets what torch's threads read when torch is loaded.
`resmaster_stages`, which is also a library for other programs, changes no environment.
"""

import os

# Two threads that spin while they wait are many times slower than one where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
