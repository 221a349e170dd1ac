"""Asks for chosen samples to be made again with a new seed. The request is a record in the dataset (`dataset.redo`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.chain import read_chains, redo_left
from resmaster_stages.dataset.dataset import RACES, Dataset
from resmaster_stages.dataset.records import record_text
from resmaster_stages.dataset.redo import RedoRequest, Redos
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import PlanError, UserError
from resmaster_stages.inspection.key_lists import KeyList, planned_keys, read_key_list
from resmaster_stages.inspection.status import status
from resmaster_stages.storage.probe import require_one_winner


@dataclass(frozen=True)
class Wish:
    """Samples of a dataset that somebody wants made again."""

    keys: Mapping[str, int]
    """Sample -> its shard."""
    stage: str
    """The first stage that makes them again."""
    redone_since: int = 0
    """Number of rejected samples that are left out, because they were asked for again after they had been rejected."""


def wish(dataset: Dataset, text: str, stage: str | None = None) -> Wish:
    """What `--redo text --from stage` asks for. Writes nothing.

    Raises UserError if `text` is no list of planned samples, or if no new seed makes them other ones in this dataset.
    """
    wanted = read_key_list(text, "--redo")
    first, keys = _first_stage(dataset, stage), planned_keys(dataset, wanted)
    earlier = _redone_since(dataset.redos, wanted, keys)
    return Wish({key: shard for key, shard in keys.items() if key not in earlier}, first, len(earlier))


def ask(dataset: Dataset, wanted: Wish) -> tuple[RedoRequest, bool]:
    """The request for the samples of a wish (at least one), and whether it is new.

    A request for the same samples that is not fulfilled and published yet counts as the same wish. So a command that
    was killed can be run again. Raises UserError if the store lets two writers create the same name, and the
    configuration does not allow that.
    """
    if not dataset.config.allow_overwriting_store:
        require_one_winner(dataset.folder)
    for _ in range(RACES):
        now = Dataset(dataset.folder, dataset.config)
        for request in reversed(now.redos.requests):
            if (request.keys, request.stage) == (wanted.keys.keys(), wanted.stage) and _is_open(now, request):
                return request, False
        request = _next_request(now, wanted)
        try:
            dataset.folder.create(layout.redo(request.number), record_text(request))
        except FileExistsError:
            continue
        return request, True
    raise PlanError(f"{dataset.url}: other processes keep asking for samples again; run one at a time")


def asked(dataset: Dataset, text: str, stage: str | None = None) -> str:
    """Ask for samples as `--redo text --from stage` says. Returns what was done, in one line for people."""
    wanted = wish(dataset, text, stage)
    others = f"{wanted.redone_since} rejected samples were asked for again since they were rejected"
    if not wanted.keys:
        return f"{dataset.url}: {others}; none is left to ask for"
    request, new = ask(dataset, wanted)
    name = layout.redo(request.number)
    count = f"{len(request.keys)} sample{'s' if len(request.keys) > 1 else ''}"
    said = f"{count} to make again from {request.stage} on ({name})"
    if not new:
        said = f"{count} to make again were asked for already ({name}); this goes on with them"
    return f"{dataset.url}: {said}" + (f"; {others}" if wanted.redone_since else "")


def _first_stage(dataset: Dataset, stage: str | None) -> str:
    """The stage from which samples are made again: `stage`, or the first with seeds. Raises UserError."""
    seeded = [name for name in dataset.hashes if STAGES[name].seeded(dataset.config)]
    if not seeded:
        raise UserError(
            f"{dataset.url}: its images are enlarged by {dataset.config.upscale.method}, which draws nothing by "
            "chance: made again, they would be the same; choose another upscale.method"
        )
    if stage is None:
        return seeded[0]
    if stage not in seeded:
        raise UserError(
            f"--from {stage}: no new seed makes another result there; stages of this dataset that draw by a seed: "
            f"{', '.join(seeded)}"
        )
    return stage


def _redone_since(redos: Redos, wanted: KeyList, keys: Collection[str]) -> set[str]:
    """The samples that were asked for again after a list of choices had rejected them."""
    return {
        key
        for key in keys
        if key in wanted.when and key in redos.last_asked
        if _moment(wanted.when[key], wanted) <= _moment(redos.last_asked[key], wanted)
    }


def _moment(text: str, wanted: KeyList) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{wanted.option}: {wanted.name}: when: {text[:60]!r} is no time in ISO 8601") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _is_open(dataset: Dataset, request: RedoRequest) -> bool:
    """Whether samples of a request are not made yet, or whether what is committed is not published."""
    shards = {int(shard) for shard in request.takes}
    left = redo_left(dataset)
    return any(shards & found.keys() for found in left.values()) or bool(status(dataset).published.problem)


def _next_request(dataset: Dataset, wanted: Wish) -> RedoRequest:
    """The request for the samples' next takes: one more than any that was asked for or made."""
    takes: dict[str, dict[str, int]] = {}
    known = {shard: chain.known() for shard, chain in read_chains(dataset, sorted(set(wanted.keys.values())))}
    for key, shard in wanted.keys.items():
        takes.setdefault(str(shard), {})[key] = known.get(shard, {}).get(key, 0) + 1
    return RedoRequest(
        number=dataset.redos.last + 1,  # of the same reading, so that a request in between is noticed
        stage=wanted.stage,
        takes=takes,
        asked_at=datetime.now(UTC).isoformat(timespec="microseconds"),
    )
