"""The error classes. A message names the culprit and says what to do next.

Invariants:
- `UserError` and its children are the user's to mend: the CLI prints one line and exits with status 2, without a traceback.
- `SampleError` costs one ledger row and never a shard.
- `GpuLost` ends the process: the device context is poisoned and nothing computed after it can be trusted.
"""

from __future__ import annotations


class ResMasterError(Exception):
    """Base of every error that this project raises on purpose."""


class UserError(ResMasterError):
    """Bad input. The message is one line: what is wrong, and what to do about it."""


class ConfigError(UserError):
    """The configuration is wrong, or contradicts the dataset that is already at the root."""


class PlanError(UserError):
    """The dataset's plan or an upstream commit is missing or does not fit."""


class SampleError(ResMasterError):
    """One sample cannot be made (bad prompt, undecodable image, NaN latents). The shard goes on."""


class ShardError(ResMasterError):
    """More samples of a shard failed than the configuration allows: nothing was committed."""


class GpuLost(ResMasterError):
    """The device is gone (illegal access, ECC, launch failure). Never retried in this process."""
