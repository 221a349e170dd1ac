"""`resmaster` with stand-in stages that take their time, so that it can be struck at work."""

import random
import sys
from dataclasses import replace

from benchmarks.soak.recipes import slowed
from resmaster_flows.cli.main import main
from resmaster_stages.dataset.stages import STAGES
from tests.fake_stages import FAKES

if __name__ == "__main__":
    for name, process in FAKES.items():
        STAGES[name] = replace(STAGES[name], process=slowed(process, random.Random(), seconds=0.3))
    sys.exit(main())
