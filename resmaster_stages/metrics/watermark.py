"""Watermark score: does an image show a watermark, by a classifier?

The number is that of the model that `quality.watermark` names, so numbers of different models must not be compared.
"""

from __future__ import annotations

from resmaster_stages.metrics.metric import Column, Flag, Metric

METRIC = Metric(
    compute=lambda pair: (pair.score_models["watermark"].score(pair.high),),
    setting="watermark",
    columns=(
        Column(
            "watermark_score",
            "how probably the image shows a watermark, by the model in quality.watermark",
            label="watermark",
            form="{:.3f}",
            better="↓",
            compared=True,
            flag=Flag("watermark", "probably shows a watermark", above="max_watermark"),
        ),
    ),
)
