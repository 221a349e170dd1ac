"""Settings of every test. They are made before any library reads them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests download nothing
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other where cores are shared
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
