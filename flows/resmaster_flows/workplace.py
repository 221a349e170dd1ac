"""Says where the stages of a build run: in the build's own process, on workers, or on a cluster.

Of Prefect, only its settings are imported, because the rest takes seconds.
"""

from __future__ import annotations

from resmaster_stages.config.dataset import DispatchConfig


def on_workers(config: DispatchConfig) -> bool:
    """Whether workers do the work: if the configuration says so, or with `auto` if a server is configured."""
    if config.where != "auto":
        return config.where == "workers"
    from prefect.settings import get_current_settings

    return get_current_settings().api.url is not None


def computed_here(config: DispatchConfig) -> bool:
    """Whether the stages run in the build's own process, so that this machine must have their devices."""
    return config.where not in ("dask", "ray") and not on_workers(config)
