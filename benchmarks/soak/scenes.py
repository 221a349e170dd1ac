"""The scenes of the soak: what is built in a round, what disturbs it, and that it ends as if undisturbed.

A scene is a function of a round. It returns what was done, by name, and raises `Difference` if a promise is broken.
"""

from __future__ import annotations

import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.soak.compare import Seen, check, seen
from benchmarks.soak.harm import harmed, possible
from benchmarks.soak.processes import Crew, Work, ask, fork
from benchmarks.soak.programs import struck_runs, struck_server
from benchmarks.soak.proxy import proxied
from benchmarks.soak.recipes import (
    Recipe,
    build,
    clean_up,
    finish,
    picturebook,
    plain,
    repair,
    slow,
    small,
    standins,
    through,
    tiny,
    verified,
)
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.errors import ResMasterError, ShardError
from resmaster_stages.publish.publish import publish


@dataclass(frozen=True)
class Calm:
    """A recipe and what its undisturbed build looks like."""

    made: Recipe
    expected: Seen


class Calms:
    """The undisturbed builds, each made once, when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, Calm] = {}

    def __getitem__(self, name: str) -> Calm:
        if name not in self._made:
            made = RECIPES[name](self.folder / name)
            root = str(self.folder / name / "calm")
            ask(finish, made, root)
            self._made[name] = Calm(made, ask(seen, root))
        return self._made[name]


RECIPES: Mapping[str, Callable[[Path], Recipe]] = {
    "stand-ins": standins,
    "small": small,
    "slow": slow,
    "plain": plain,
    "tiny": tiny,
    "picturebook": picturebook,
}


@dataclass(frozen=True)
class Round:
    """One round of one scene."""

    seed: int
    """Of the whole soak."""
    number: int
    chance: random.Random
    place: str
    """`folder` or `s3`."""
    folder: Path
    """For files of the round's own."""
    root: str
    """Where its dataset goes."""
    endpoint: str
    """The S3 server; empty on a folder."""
    calms: Calms
    processes: int
    """So many work at a time."""
    usual_blows: int

    @cached_property
    def blows(self) -> int:
        """How often processes are struck."""
        return self.chance.randint(self.usual_blows // 2, self.usual_blows * 3 // 2)

    @cached_property
    def few(self) -> int:
        """How often programs are struck, which take long to start."""
        return self.chance.randint(1, max(1, self.usual_blows // 3))


def counter() -> Any:
    """A number that children count up."""
    return multiprocessing.get_context("fork").RawValue("l", 0)


def ended(each: Round, calm: Calm, done: Counter[str]) -> Counter[str]:
    """Finish in peace, and compare."""
    return done + ask(finish, calm.made, each.root) + ask(check, calm.made, each.root, calm.expected)


# ----------------------------------------------------------------------------------------------------------------------
# builds


def racing(each: Round, recipe: str, start: Callable[[Recipe, int], int]) -> Counter[str]:
    """Processes race to build a dataset, are struck, and one more finishes in peace."""
    calm = each.calms[recipe]
    crew = Crew(lambda: start(calm.made, each.chance.getrandbits(32)), each.chance)
    return ended(each, calm, crew.disturbed(each.processes, each.blows))


def same_place(each: Round) -> Counter[str]:
    """One process at a time, which dies again and again at the same samples: they run alone, and are left out. With
    stand-ins or the tiny model in turn."""
    calm = each.calms["tiny" if each.number % 2 else "slow"]
    crew = Crew(lambda: fork(build, calm.made, each.root, each.chance.getrandbits(32)), each.chance, mean_seconds=0.15)
    return ended(each, calm, crew.disturbed(1, 2 * each.blows))


def stand_ins(each: Round) -> Counter[str]:
    """Stand-in stages; 2 % of all calls to the store fail, before or after they took effect."""
    faults = counter()
    done = racing(each, "stand-ins", lambda made, seed: fork(build, made, each.root, seed, faults))
    return done + Counter(faults=faults.value)


def tiny_model(each: Round) -> Counter[str]:
    """The real stages with a tiny model."""
    return racing(each, "tiny", lambda made, seed: fork(build, made, each.root, seed))


def embedded_model(each: Round) -> Counter[str]:
    """The real stages with the embedded model."""
    return racing(each, "picturebook", lambda made, seed: fork(build, made, each.root, seed))


def proxy(each: Round) -> Counter[str]:
    """Stand-in stages through a proxy that fails as stores and networks do."""
    with proxied(each.endpoint, each.chance.getrandbits(32)) as (endpoint, faults):
        done = racing(each, "stand-ins", lambda made, seed: fork(through, endpoint, build, made, each.root, seed))
    return done + Counter(faults=faults.value)


# ----------------------------------------------------------------------------------------------------------------------
# a finished dataset, and the verbs that keep it


def verbs(each: Round) -> Counter[str]:
    """A dataset that lost objects, while repair, verify, gc and publish are struck at work."""
    calm = each.calms["stand-ins"]
    ask(finish, calm.made, each.root)
    lost = ask(lose, each.root, each.chance.randint(1, 6), each.chance.getrandbits(32))
    work: list[tuple[Work, tuple[object, ...]]] = [
        (verified, (each.root,)),
        (clean_up, (each.root,)),
        (mended, (calm.made, each.root)),
        (published, (each.root,)),
    ]

    def start() -> int:
        task, arguments = each.chance.choice(work)
        return fork(politely, task, *arguments)

    done = Crew(start, each.chance, mean_seconds=0.05).disturbed(each.processes, each.blows)
    return mended_in_peace(each, calm, done + Counter(damages=lost))


def beside_gc(each: Round) -> Counter[str]:
    """A build with `gc --older-than 0` beside it all the time. What gc takes before it is committed comes back, for
    verify says so."""
    calm = each.calms["stand-ins"]

    def start() -> int:
        if each.chance.random() < 0.25:
            return fork(cleaning, each.root)
        return fork(politely, build, calm.made, each.root, each.chance.getrandbits(32))

    done = Crew(start, each.chance).disturbed(each.processes + 1, each.blows, endless=True)
    return mended_in_peace(each, calm, done)


def mended_in_peace(each: Round, calm: Calm, done: Counter[str]) -> Counter[str]:
    """Finish what was begun, then verify, repair and compare."""
    ask(finished_if_whole, calm.made, each.root)
    said = ask(verified, each.root)
    return ended(each, calm, done + Counter({"objects mended": len(said.damage)}))


def finished_if_whole(made: Recipe, root: str) -> None:
    """Finish, unless an object is gone or damaged, which the commands say."""
    with suppress(ShardError):
        finish(made, root)


def mended(made: Recipe, root: str) -> None:
    """As `resmaster repair`, without its publishing."""
    repair(made, open_dataset(root))


def published(root: str) -> None:
    """As `resmaster publish`."""
    publish(open_dataset(root))


def cleaning(root: str) -> None:
    """gc, again and again."""
    while True:
        politely(clean_up, root)


def politely(work: Work, *arguments: object) -> None:
    """An error that says what to do is no crash."""
    with suppress(OSError, ResMasterError):
        work(*arguments)


def lose(root: str, count: int, seed: int) -> int:
    """Delete, cut off or change `count` objects. How many there were."""
    dataset, chance = open_dataset(root), random.Random(seed)
    names = [
        stored.name
        for stage in dataset.hashes
        for receipt in dataset.commits(stage).read_all().values()
        for stored in receipt.objects
    ]
    for name in chance.sample(sorted(names), count):
        data = bytearray(dataset.folder.read(name))
        way = chance.choice(("delete", "cut", "flip"))
        if way == "delete":
            dataset.folder.remove(name)
            continue
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        dataset.folder.write(name, bytes(data if way == "flip" else data[: len(data) // 2]))
    return count


def damages(each: Round) -> Counter[str]:
    """A finished dataset that is damaged in one place after the other. The rounds of one soak take all damages in
    turn."""
    calm = each.calms["small"]
    ask(finish, calm.made, each.root)
    every = ask(possible, each.root)
    random.Random(each.seed).shuffle(every)
    done: Counter[str] = Counter()
    for number in range(each.usual_blows):
        damage = every[(each.number * each.usual_blows + number) % len(every)]
        done += ask(harmed, calm.made, each.root, damage, calm.expected)
    return done + ask(check, calm.made, each.root, calm.expected)


# ----------------------------------------------------------------------------------------------------------------------
# the real programs


def command_line(each: Round) -> Counter[str]:
    """`resmaster run`, of which the group, the main process or a child is killed."""
    calm = each.calms["plain"]
    done = ask(struck_runs, calm.made, each.root, each.folder, each.chance.getrandbits(32), each.few)
    return ended(each, calm, done)


def server(each: Round) -> Counter[str]:
    """A build on a Prefect server with workers, all of which are killed and started again."""
    calm = each.calms["plain"]
    done = ask(struck_server, calm.made, each.root, each.folder, each.chance.getrandbits(32), each.few)
    return ended(each, calm, done)


# ----------------------------------------------------------------------------------------------------------------------
# the table


@dataclass(frozen=True)
class Scene:
    """One row of the table of scenes."""

    play: Callable[[Round], Counter[str]]
    places: tuple[str, ...] = ("folder", "s3")
    every: int = 1
    """It takes its turn in every so-manyeth round."""


SCENES: Mapping[str, Scene] = {
    "stand-ins": Scene(stand_ins),
    "tiny-model": Scene(tiny_model),
    "same-place": Scene(same_place),
    "proxy": Scene(proxy, ("s3",)),
    "verbs": Scene(verbs),
    "beside-gc": Scene(beside_gc, every=2),
    "damages": Scene(damages),
    "command-line": Scene(command_line, every=3),
    "embedded-model": Scene(embedded_model, every=6),
    "server": Scene(server, ("folder",), every=12),
}
