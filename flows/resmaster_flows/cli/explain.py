"""`resmaster explain`: all that is known of one sample."""

from __future__ import annotations

import argparse
import json

from rich.console import Console


def explain(args: argparse.Namespace, console: Console) -> int:
    """`resmaster explain`"""
    from resmaster_stages.dataset.dataset import open_dataset
    from resmaster_stages.inspection.explain import explain as explain_sample
    from resmaster_stages.inspection.explain import spelled

    found = explain_sample(open_dataset(args.root), args.key)
    print(json.dumps(found.to_json(), indent=2, ensure_ascii=False) if args.json else spelled(found))
    return 0
