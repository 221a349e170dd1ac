"""`resmaster` with the stand-in stages of `tests.fake_stages`: no model, no GPU, everything else real.

python -m tests.standin_cli run CONFIG --root ROOT
"""

from __future__ import annotations

import sys
from dataclasses import replace

from resmaster_flows.cli.main import main
from resmaster_stages.dataset.stages import STAGES, Process
from resmaster_stages.models import identity
from resmaster_stages.models.identity import Weights
from tests.fake_stages import FAKES


def install(processes: dict[str, Process]) -> None:
    """Put `processes` where the pipeline looks for its stages, for the rest of this process."""
    identity.weights_of = lambda config: Weights(config.model.id)
    for name, process in processes.items():
        STAGES[name] = replace(STAGES[name], process=process)


if __name__ == "__main__":
    install(FAKES)
    sys.exit(main())
