"""Unsafe score: is an image unsafe for work, by a classifier?

The number is that of the model that `quality.safety` names, so numbers of different models must not be compared.
"""

from __future__ import annotations

from resmaster_stages.metrics.metric import Column, Flag, Metric

METRIC = Metric(
    compute=lambda pair: (pair.score_models["safety"].score(pair.high),),
    setting="safety",
    columns=(
        Column(
            "unsafe_score",
            "how unsafe for work the image is, by the model in quality.safety",
            label="unsafe",
            form="{:.3f}",
            better="↓",
            compared=True,
            flag=Flag("unsafe", "probably not safe for work", above="max_unsafe"),
        ),
    ),
)
