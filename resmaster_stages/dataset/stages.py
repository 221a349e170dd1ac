"""The table of stages that work on shards: one row per stage, with its function, its inputs and its identity.

Stage 1, prompt ingestion, is not in the table, because it makes the plan that the other stages follow. Paths, tables,
hashes, order and help texts all derive from a stage's row. This module loads no model; it reads only the names of
weights.

Invariant: a stage's hash covers what changes its result, its version, and the hashes of the stages that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.keys import digest
from resmaster_stages.metrics import metric_columns
from resmaster_stages.models.identity import Weights

if TYPE_CHECKING:
    import pyarrow as pa

Process = Callable[[DatasetConfig, Sequence[Sample]], Iterable[Output]]
"""The function of a stage: (configuration, samples of one slot) -> one Output per sample, in order."""


def _always(config: DatasetConfig) -> bool:
    return True


def _never(config: DatasetConfig) -> bool:
    return False


def _one(config: DatasetConfig) -> int:
    return 1


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline."""

    name: str
    """Letters and underscores. Also the name of the folder of its objects."""
    process: str | Process
    """The function itself, or `module:function`, which is imported at the first use because stages import torch."""
    identity: Callable[[DatasetConfig, Weights], dict[str, Any]]
    """Gives the values of configuration and weights that change the result, JSON-ready."""
    doing: str
    """Text that users read while the stage works, e.g. `upscaling`."""
    version: int = 1
    """Raised by hand whenever the stage's code changes its result. Commits of older versions then no longer count."""
    reads: tuple[str, ...] = ()
    """The stages whose outputs `process` sees."""
    schema: Callable[[], pa.Schema] | None = None
    """Gives the columns of the stage's table. None: the stage makes images, which are kept in a tar."""
    written: Callable[[DatasetConfig], pa.Schema] | None = None
    """Gives the columns of `schema` that a dataset's tables have. None: all of them."""
    needed: Callable[[DatasetConfig], bool] = _always
    """Whether a dataset needs the stage."""
    seeded: Callable[[DatasetConfig], bool] = _never
    """Whether the result depends on `Sample.take`, by a seed. Only from such a stage on, samples can be made again."""
    batch: tuple[str, str] | None = None
    """Part and field of the configuration that hold the batch size on the device. None: one image at a time."""
    slot: Callable[[DatasetConfig], int] = _one
    """How many samples are computed together. Slots are counted from the first sample of the shard.

    After a killed process, whole slots are recomputed and suspected.
    """

    @property
    def extension(self) -> Literal["tar", "parquet"]:
        """Extension of its objects: images are in a WebDataset tar, rows are in Parquet."""
        return "tar" if self.schema is None else "parquet"

    def columns(self, config: DatasetConfig) -> pa.Schema:
        """The columns of the table of a stage that makes rows."""
        assert self.schema is not None
        return self.written(config) if self.written else self.schema()

    def function(self) -> Process:
        """The function `process`, imported if need be."""
        if not isinstance(self.process, str):
            return self.process
        module, _, name = self.process.partition(":")
        function: Process = getattr(import_module(module), name)
        return function


def _model(config: DatasetConfig, weights: Weights) -> dict[str, Any]:
    return {**config.model.base.identity(), "weights": weights.model}


def _denoiser(config: DatasetConfig, weights: Weights) -> dict[str, Any]:
    """`_model`, with the few-step weights that the high_res stage uses instead of its denoiser."""
    few_step = config.model.few_step
    own = {} if few_step is None else {"few_step": {**few_step.identity(), "weights": weights.few_step}}
    return {**_model(config, weights), **own}


def _low_res_identity(config: DatasetConfig, weights: Weights) -> dict[str, Any]:
    own: dict[str, Any] = {"plan": config.plan_identity(), "image_format": config.image_format}
    own |= _metadata_of_images(config)
    return own if config.images else {**own, "low_res": config.low_res.identity(), "model": _model(config, weights)}


def _captions_identity(config: DatasetConfig, weights: Weights) -> dict[str, Any]:
    views: dict[str, Any] = {"scale": config.upscale.way()[0].scale, "stride": config.upscale.view_stride}
    if any(config.upscale.wraps):
        views["wraps"] = config.upscale.wraps
    own: dict[str, Any] = {
        "captions": config.captions.identity(),
        "views": views,
        "weights": weights.captioner,
        "tokenizer": weights.model,
    }
    if config.captions.source == "attention":
        own["model"] = _model(config, weights)
    if judge := config.caption_clip():
        own["check"] = {"clip": judge, "weights": weights.caption_check, "margin": config.captions.check.margin}
    return own


def _high_res_identity(config: DatasetConfig, weights: Weights) -> dict[str, Any]:
    networks: dict[str, Any] = {}
    if config.upscale.base_model:
        networks["model"] = _denoiser(config, weights)
    if weights.upscaler or not config.upscale.base_model:
        networks["weights"] = weights.upscaler
    if config.upscale.uses("control"):
        networks["control"] = weights.control
    return {
        "upscale": config.upscale.identity(),
        **networks,
        "image_format": config.image_format,
        **_quality_of_images(config),
        **_metadata_of_images(config),
    }


def _quality_of_images(config: DatasetConfig) -> dict[str, int]:
    """The setting that says how large images are encoded. That of PNG, which has none, is WebP's since the first
    datasets."""
    name = f"{config.image_format}_quality" if config.image_format in ("avif", "jxl") else "webp_quality"
    return {name: getattr(config, name)}


def _metadata_of_images(config: DatasetConfig) -> dict[str, str]:
    """What image files say of themselves, and whether samples tell what yours say. In the first datasets, neither."""
    return {} if config.image_metadata == "none" else {"image_metadata": config.image_metadata}


def _quality_identity(config: DatasetConfig, weights: Weights) -> dict[str, Any]:
    return {
        "quality": config.quality.identity(),
        "weights": weights.clip,
        "features": weights.features,
        "columns": [column.name for column in metric_columns(config.quality)],
        **({"scores": dict(weights.scores)} if weights.scores else {}),
    }


def _recaptions_identity(config: DatasetConfig, weights: Weights) -> dict[str, Any]:
    captioner = config.recaptioner()
    return {
        "styles": config.recaption.styles,
        "source": captioner.source,
        "model": captioner.model,
        "revision": captioner.revision,
        "max_new_tokens": config.recaption.max_new_tokens,
        "longest_px": config.recaption.longest_px,
        "weights": weights.recaptioner,
    }


def _captions_schema() -> pa.Schema:
    from resmaster_stages.dataset.schemas import CAPTIONS_SCHEMA

    return CAPTIONS_SCHEMA


def _quality_schema(config: DatasetConfig | None = None) -> pa.Schema:
    from resmaster_stages.dataset.schemas import quality_schema

    return quality_schema(config.quality if config else None)


def _recaptions_schema() -> pa.Schema:
    from resmaster_stages.dataset.schemas import RECAPTIONS_SCHEMA

    return RECAPTIONS_SCHEMA


STAGES: dict[str, Stage] = {}
"""Name -> stage, in pipeline order."""


def register(stage: Stage) -> None:
    """Add a stage at the end of the table."""
    STAGES[stage.name] = stage


register(
    Stage(
        "low_res",
        process="resmaster_stages.low_res:process",
        identity=_low_res_identity,
        doing="drawing low-res images",
        version=2,
        seeded=lambda config: not config.images,
        batch=("low_res", "batch_size"),
        slot=lambda config: 1 if config.images else config.low_res.batch_size,
    )
)
register(
    Stage(
        "captions",
        process="resmaster_stages.captions:process",
        identity=_captions_identity,
        doing="captioning patches",
        reads=("low_res",),
        schema=_captions_schema,
        needed=lambda config: config.upscale.uses("captions"),
        batch=("captions", "batch_size"),
    )
)
register(
    Stage(
        "high_res",
        process="resmaster_stages.high_res:process",
        identity=_high_res_identity,
        doing="upscaling",
        reads=("low_res", "captions"),
        seeded=lambda config: config.upscale.base_model,
        batch=("upscale", "view_batch"),
    )
)
register(
    Stage(
        "quality",
        process="resmaster_stages.quality:process",
        identity=_quality_identity,
        doing="measuring quality",
        version=3,
        reads=("low_res", "high_res"),
        schema=_quality_schema,
        written=_quality_schema,
    )
)
register(
    Stage(
        "recaptions",
        process="resmaster_stages.recaptions:process",
        identity=_recaptions_identity,
        doing="captioning large images",
        reads=("high_res",),
        schema=_recaptions_schema,
        needed=lambda config: bool(config.recaption.styles),
    )
)


def stages_of(config: DatasetConfig) -> tuple[str, ...]:
    """The stages that a dataset needs, in pipeline order."""
    return tuple(name for name, stage in STAGES.items() if stage.needed(config))


def reads_of(config: DatasetConfig, stage: str) -> tuple[str, ...]:
    """The stages whose outputs `stage` reads in this dataset."""
    needed = stages_of(config)
    return tuple(name for name in STAGES[stage].reads if name in needed)


def hashes_of(config: DatasetConfig, weights: Weights) -> dict[str, str]:
    """Stage -> the identity (64 hex digits) of its result, for every stage that a dataset needs."""
    hashes: dict[str, str] = {}
    for name in stages_of(config):
        stage = STAGES[name]
        hashes[name] = digest(
            {
                "stage": name,
                "version": stage.version,
                "config": stage.identity(config, weights),
                "reads": {each: hashes[each] for each in reads_of(config, name)},
            }
        )
    return hashes


def stage_hashes(config: DatasetConfig) -> dict[str, str]:
    """`hashes_of` with the weights that the configuration names."""
    from resmaster_stages.models.identity import weights_of

    return hashes_of(config, weights_of(config))
