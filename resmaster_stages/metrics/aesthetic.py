"""Aesthetic score: do people like images such as this one, by a model that learned from people's ratings?

The number is that of the model that `quality.aesthetic` names, so numbers of different models must not be compared.
"""

from __future__ import annotations

from resmaster_stages.metrics.metric import Column, Flag, Metric

METRIC = Metric(
    compute=lambda pair: (pair.score_models["aesthetic"].score(pair.high),),
    setting="aesthetic",
    columns=(
        Column(
            "aesthetic_score",
            "how much people like such images, by the model in quality.aesthetic",
            label="aesthetic",
            form="{:.2f}",
            better="↑",
            compared=True,
            flag=Flag("unaesthetic", "a low aesthetic score", below="min_aesthetic"),
        ),
    ),
)
