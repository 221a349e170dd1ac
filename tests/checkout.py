"""Where this checkout is, for tests and for the programs that they start."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent

PYTHONPATH = os.pathsep.join(map(str, (ROOT, ROOT / "flows", ROOT / "tasks")))
"""With it, a program in any folder imports the packages of this checkout, installed or not."""
