"""Where this project's files lie that are no code: `deployments/` and the job templates of `infra/`.

A checkout has them at its root. A wheel has copies of them in this package, made when it is built (setup.py).
"""

from __future__ import annotations

from pathlib import Path

import resmaster_stages


def _home() -> Path:
    package = Path(__file__).resolve().parent
    return package if (package / "deployments").is_dir() else package.parents[1]


HOME = _home()
"""The folder that holds `deployments` and `infra`."""
EXAMPLES = HOME / "deployments" / "datasets"
"""The folder of the example configurations."""
PROMPTS = Path(resmaster_stages.__file__).resolve().parent / "picturebook" / "prompts.txt"
"""The prompts of the demo."""
