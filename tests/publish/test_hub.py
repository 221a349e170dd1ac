"""Pushes to a stand-in of the hub (`tests.hub_server`), with a real client."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from resmaster_flows.cli.main import main
from resmaster_stages.config.load import load_config
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import described
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.publication import read_publication, write_publication
from resmaster_stages.dataset.retry import number_of, retries_of
from resmaster_stages.errors import PlanError, ShardError, UserError
from resmaster_stages.models.identity import Weights
from resmaster_stages.prompts import ingest
from resmaster_stages.publish import hub as hub_module
from resmaster_stages.publish.hub import Repository, compare, push, repository_of
from resmaster_stages.publish.publish import publish
from resmaster_stages.publish.shared import shared
from resmaster_stages.runner.run import run_stage
from tests.checkout import PYTHONPATH
from tests.fake_stages import FAKES, config_at, planned, png
from tests.hub_server import READER, SIGNATURE, TOKEN, Fault, Hub, Repo, standing_in

NAME = "me/demo"
URL = f"hf://datasets/{NAME}"
COMMIT = f"/api/datasets/{NAME}/commit/"
PROMPTS = ["a", "b", "bad high_res", "c", "d", "e"]


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in that the client of this process talks to, logged in, without waits between tries."""
    with standing_in() as server:
        for name, value in (
            ("ENDPOINT", server.endpoint),
            ("HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        monkeypatch.setattr(hub_module, "FILES_PER_COMMIT", 4)
        monkeypatch.setattr(hub_module, "FILES_TOGETHER", 3)
        yield server
        close_session()


def environment(hub: Hub) -> dict[str, str]:
    """What makes the client of another process talk to the stand-in."""
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": PYTHONPATH}
    return {**os.environ, **own}


def build(root: str | Path, folder: Path, prompts: list[str] = PROMPTS) -> Dataset:
    dataset = planned(root, prompts, folder)
    for shard in range(dataset.plan.shards):
        for stage in dataset.hashes:
            run_stage(dataset, stage, shard, process=FAKES[stage])
    return dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Three shards, committed and published."""
    made = build(tmp_path / "out", tmp_path)
    publish(made)
    return made


def contents(dataset: Dataset) -> dict[str, bytes]:
    """What readers need, by the records."""
    files = shared(dataset)
    found = {file.name: dataset.folder.read(file.name) for file in (*files.objects, *files.entries)}
    return {**found, "config.yaml": files.settings}


def held(repo: Repo) -> dict[str, bytes]:
    return {name: content for name, content in repo.files.items() if name != ".gitattributes"}


def test_the_repository_holds_the_publication_byte_for_byte(
    hub: Hub, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset.folder.write("high_res/000000-deadbeef.tar", b"leftover of an interrupted attempt")
    assert main(["publish", dataset.url, "--to", URL]) == 0
    shown = capsys.readouterr()
    repo = hub.repos[NAME]
    assert held(repo) == contents(dataset)
    assert repo.private
    names = set(held(repo))
    tars = {row.name for row in shared(dataset).objects}
    assert {name.partition("/")[0] for name in tars} == {"low_res", "captions", "high_res", "quality"}
    assert names - tars == {"manifest.parquet", "index.json", "README.md", "config.yaml"}
    assert f"pushed: {hub.endpoint}/datasets/{NAME}\n" in shown.out
    assert "sending 16 files" in shown.err
    assert f"  {len(repo.commits[-1][2]) - 13} files committed, 0 to go" in shown.err


def test_every_commit_before_the_last_leads_readers_nowhere(hub: Hub, dataset: Dataset) -> None:
    push(dataset, compare(dataset, Repository(NAME)))
    _, *commits = hub.repos[NAME].commits
    assert len(commits) == 4
    for _, message, files in commits[:-1]:
        assert message == "Add 4 files of demo"
        assert not {"README.md", "manifest.parquet", "index.json"} & set(files)
    assert commits[-1][1] == "Publish demo"


def test_a_second_push_sends_nothing(hub: Hub, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", dataset.url, "--to", URL, "--public"]) == 0
    assert not hub.repos[NAME].private
    commits, uploads = len(hub.repos[NAME].commits), len(hub.uploads)
    assert uploads == len({*hub.uploads}) == 13
    capsys.readouterr()
    assert main(["publish", dataset.url, "--to", URL]) == 0
    assert (len(hub.repos[NAME].commits), len(hub.uploads)) == (commits, uploads)
    assert "sending 0 files, 0 B (16 are there already)" in capsys.readouterr().err


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer lost"])
def test_a_push_goes_on_after_a_failure_at_any_commit(hub: Hub, dataset: Dataset, number: int, after: bool) -> None:
    hub.faults = [Fault("POST", COMMIT, times=99, skip=number, after=after)]
    with pytest.raises(ConnectionError, match="cannot be reached"):
        push(dataset, compare(dataset, Repository(NAME)))
    hub.faults = []
    before = len(hub.uploads)
    work = compare(dataset, Repository(NAME))
    assert len(work.objects_due) == 12 - 4 * min(3, number + after)
    push(dataset, work)
    assert held(hub.repos[NAME]) == contents(dataset)
    assert len(hub.uploads) == 13, "nothing was sent twice"
    assert before == min(13, 4 * (number + 1))


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", COMMIT, 500),
        Fault("POST", COMMIT, 429, headers={"Retry-After": "7"}),
        Fault("POST", COMMIT),
        Fault("POST", COMMIT, after=True),
        Fault("PUT", "/lfs/", 500, times=2),
        Fault("PUT", "/lfs/"),
        Fault("PUT", "/part/", 503),
        Fault("POST", "/complete/", 500),
        Fault("POST", "/batch", 429, headers={"Retry-After": "7"}),
        Fault("POST", "/verify", 500),
        Fault("POST", "/preupload/", 502),
        Fault("POST", "/api/validate-yaml", 503),
        Fault("POST", "/api/repos/create", 500),
        Fault("GET", "/tree/", 504),
    ],
    ids=lambda fault: f"{fault.path.split('/')[-1] or fault.path} {fault.status} {fault.after}",
)
def test_what_passes_is_tried_again(hub: Hub, dataset: Dataset, fault: Fault) -> None:
    hub.faults = [fault]
    push(dataset, compare(dataset, Repository(NAME)))
    assert hub.faults == [replace(fault, times=0)]
    assert held(hub.repos[NAME]) == contents(dataset)


def test_waits_that_the_hub_asks_for_are_told(
    hub: Hub, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    limit = {"RateLimit": '"api";r=0;t=55', "Retry-After": "9"}
    hub.faults = [
        Fault("POST", COMMIT, 429, headers=limit),
        Fault("POST", "/batch", 429, headers={"Retry-After": "33"}),
    ]
    assert main(["publish", dataset.url, "--to", URL]) == 0
    shown = capsys.readouterr().err
    assert "the hub asks to wait for 56 s" in shown
    assert "Rate limited. Waiting 34.0s" in shown
    assert {56.0, 34.0} <= set(waits)


def test_a_hub_that_is_silent_is_not_waited_for(hub: Hub, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "ANSWER_SECONDS", 0.2)
    over = threading.Event()
    hub.hook = lambda method, path: path.startswith(COMMIT) and over.wait()
    try:
        with pytest.raises(ConnectionError, match=r"the hub cannot be reached \(.*\); check the network"):
            push(dataset, compare(dataset, Repository(NAME)))
    finally:
        over.set()


def test_a_push_that_is_killed_goes_on(hub: Hub, dataset: Dataset, tmp_path: Path) -> None:
    """By SIGKILL, while the second commit is on its way."""
    program = (
        "from resmaster_stages.publish import hub; hub.FILES_PER_COMMIT = 4; import runpy, sys;"
        "sys.argv[0] = 'resmaster'; runpy.run_module('tests.standin_cli', run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "publish", dataset.url, "--to", URL],
        env=environment(hub),
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = threading.Semaphore(0)

    def hook(method: str, path: str) -> None:
        if path.startswith(COMMIT) and len(hub.repos[NAME].commits) == 2:
            process.kill()
            process.wait()
            seen.release()

    hub.hook = hook
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    assert seen.acquire(timeout=60)
    hub.hook = lambda method, path: None
    sent = len(hub.uploads)
    assert 0 < sent < 13
    push(dataset, compare(dataset, Repository(NAME)))
    assert held(hub.repos[NAME]) == contents(dataset)
    assert len(hub.uploads) == 13
    assert TOKEN not in said


def test_a_replaced_attempt_is_deleted_and_what_users_added_stays(
    hub: Hub, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    push(dataset, compare(dataset, Repository(NAME)))
    repo = hub.repos[NAME]
    users = {"LICENSE": b"mine", "high_res/notes.tar": b"mine", "000000-deadbeef.tar": b"mine"}
    repo.files.update(users)
    before, uploads = set(held(repo)), len(hub.uploads)
    retries, samples = retries_of(dataset, None, None)
    assert samples == 1

    def good(config, samples):
        for sample in samples:
            yield from FAKES["high_res"](config, [replace(sample, prompt="good")])

    for stage in dataset.hashes:
        process = good if stage == "high_res" else FAKES[stage]
        run_stage(dataset, stage, 1, process=process, number=number_of(retries, stage, 1))
    publish(dataset)
    work = compare(dataset, Repository(NAME))
    assert [layout.object_of(name) for name in work.deleted] == [("high_res", 1), ("quality", 1)]
    assert [layout.object_of(file.name) for file in work.objects_due] == [("high_res", 1), ("quality", 1)]
    assert main(["publish", dataset.url, "--to", URL, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(f"delete: {name}\n" in shown for name in work.deleted)
    assert main(["publish", dataset.url, "--to", URL]) == 0
    assert held(repo) == {**contents(dataset), **users}
    assert before - set(held(repo)) == set(work.deleted)
    assert len(hub.uploads) == uploads + 3, "the two objects and the manifest"
    assert "2 files that no commit of the dataset names any more were deleted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "harm", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x" + path.read_bytes()[1:])]
)
def test_a_damaged_object_is_not_sent(
    hub: Hub, dataset: Dataset, harm: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    name = shared(dataset).objects[-2].name
    harm(Path(dataset.url, name))
    with pytest.raises(ShardError, match=f"{name} is .*; run: resmaster verify .*, then: resmaster repair"):
        push(dataset, compare(dataset, Repository(NAME)))
    assert len(hub.repos[NAME].commits) == 3
    assert not {name, "README.md"} & set(hub.repos[NAME].files)


def test_an_object_that_changes_while_it_is_sent_is_noticed(
    hub: Hub, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "WHOLE_BYTES", 0)
    path = Path(dataset.url, shared(dataset).objects[0].name)

    def hook(method: str, where: str) -> None:
        if "/preupload/" in where:
            path.chmod(0o644)
            path.write_bytes(path.read_bytes()[:-1] + b"x")

    hub.hook = hook
    with pytest.raises(ShardError, match="changed while it was sent"):
        push(dataset, compare(dataset, Repository(NAME)))
    assert len(hub.repos[NAME].commits) == 1


def test_files_go_from_where_they_lie(hub: Hub, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "WHOLE_BYTES", 0)
    push(dataset, compare(dataset, Repository(NAME)))
    assert held(hub.repos[NAME]) == contents(dataset)


def test_a_dry_run_writes_nothing(hub: Hub, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(dataset.url).rglob("*")}
    assert main(["publish", dataset.url, "--to", URL, "--dry-run"]) == 0
    shown = capsys.readouterr().out.split("\n")
    total = sum(map(len, contents(dataset).values()))
    assert shown[1].split() == ["send", "16", f"{total:,}"]
    assert f"{URL}: the repository is not there, or not shown; a push makes it" in shown
    assert hub.writes == []
    assert hub.repos == {}
    assert {path: path.stat().st_mtime_ns for path in Path(dataset.url).rglob("*")} == before
    push(dataset, compare(dataset, Repository(NAME)))
    assert main(["publish", dataset.url, "--to", URL, "--dry-run"]) == 0
    assert capsys.readouterr().out.split("\n")[2].split() == ["there", "already", "16", f"{total:,}"]


def test_a_dry_run_without_a_hub_lists_everything(
    hub: Hub, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_TOKEN")
    assert main(["publish", dataset.url, "--to", URL, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "what is there already is not known" in shown
    assert "the hub cannot be reached" in shown
    assert shown.split("\n")[1].split()[:2] == ["send", "16"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("out/copy", "use resmaster export"),
        ("s3://bucket/copy", "use resmaster export"),
        ("hf://datasets/demo", "namespace/name"),
        ("hf://datasets/", "give hf://datasets/NAMESPACE/NAME"),
        ("hf://me/model", "give a whole dataset repository"),
        ("hf://spaces/me/space", "give a whole dataset repository"),
        ("hf://datasets/me/demo/folder", "give a whole dataset repository"),
        ("hf://datasets/me/de mo", "give hf://datasets/NAMESPACE/NAME"),
        ("hf://datasets/me/..", "give hf://datasets/NAMESPACE/NAME"),
        ("hf://datasets/me/demo@", "give hf://datasets/NAMESPACE/NAME"),
        ("hf://buckets/me/bucket", "it is reached through S3"),
        (f"hf://user:{TOKEN}@datasets/me/x", "give"),
    ],
)
def test_other_targets_are_refused_in_one_line(
    hub: Hub, dataset: Dataset, url: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", dataset.url, "--to", url]) == 2
    shown = capsys.readouterr().err
    assert said.lower() in shown.lower()
    assert shown.count("\n") == 1
    assert TOKEN not in shown
    assert hub.requests == []


def test_the_branch_is_spelled_as_elsewhere() -> None:
    assert repository_of("hf://datasets/me/demo@v2") == Repository("me/demo", "v2")
    assert repository_of("hf://datasets/me/demo@refs/pr/3") == Repository("me/demo", "refs/pr/3")
    assert repository_of(URL).url == URL
    assert repository_of(f"{URL}@v2").url == f"{URL}@v2"


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        (Fault("POST", COMMIT, 403, message="Private repository storage limit reached"), 2, "storage limit reached"),
        (Fault("POST", COMMIT, 401, message="Invalid credentials"), 2, "the hub does not accept the token"),
        (Fault("POST", COMMIT, 404, message="gone"), 2, "the hub has no such dataset"),
        (Fault("POST", COMMIT, 402, message="upgrade"), 2, "asks for a paid plan"),
        (Fault("POST", COMMIT, 418, message="a teapot"), 2, "the hub refuses this (418: a teapot)"),
        (Fault("POST", COMMIT, 409, times=99, message="busy"), 1, "the hub answered 409 (busy); run the same command"),
        (Fault("POST", COMMIT, 500, times=99), 1, "the hub answered 500 (told to fail); run the same command again"),
        (Fault("POST", COMMIT, 429, headers={"Retry-After": "4000"}), 1, "too many requests at the hub"),
        (Fault("POST", COMMIT, times=99), 1, "the hub cannot be reached"),
        (Fault("PUT", "/(lfs|part)/", 500, times=999), 1, "the hub answered 500"),
        (Fault("PUT", "/(lfs|part)/", 403, times=999), 2, "the token may not do this there"),
        (Fault("POST", "/batch", 403, message="no"), 2, "the token may not do this there"),
        (Fault("GET", "/tree/", 401, message="Invalid credentials"), 2, "hf auth login"),
        (Fault("POST", "/api/repos/create", 403, message="no"), 2, "the token may not do this there"),
    ],
    ids=lambda value: f"{value.path} {value.status}" if isinstance(value, Fault) else "",
)
def test_each_refusal_is_one_line(
    hub: Hub, dataset: Dataset, fault: Fault, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults = [fault]
    publish(dataset)
    assert main(["publish", dataset.url, "--to", URL]) == status
    lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("resmaster: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert lines[0].startswith(f"resmaster: {URL}: ")
    assert not any(secret in lines[0] for secret in (TOKEN, SIGNATURE, "http://127"))
    if hub.repos:
        assert "README.md" not in hub.repos[NAME].files


def test_who_may_not_write_is_told_so(
    hub: Hub, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hub.create(NAME)
    for token, to, said in (
        (READER, URL, "the token may not do this there"),
        ("hf_wrong", URL, "the hub does not accept the token"),
        (TOKEN, "hf://datasets/others/x", "rights to create a dataset under the namespace others"),
        (TOKEN, f"{URL}@nowhere", "there is no such branch"),
        (TOKEN, "hf://datasets/me/new@branch", "push to it without @BRANCH first"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        assert main(["publish", dataset.url, "--to", to]) == 2
        shown = capsys.readouterr().err
        assert said in shown
        assert token not in shown
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    assert main(["publish", dataset.url, "--to", URL]) == 2
    assert "nobody is logged in to the hub here; log in with: hf auth login" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["publish", dataset.url, "--to", URL]) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert list(hub.repos) == [NAME]
    assert len(hub.repos[NAME].commits) == 1


def test_options_of_a_push_need_a_push(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--dry-run", "--public"):
        assert main(["publish", dataset.url, option]) == 2
        assert "add --to hf://datasets/NAMESPACE/NAME" in capsys.readouterr().err


def test_a_gitignore_that_keeps_shards_out_is_noticed(hub: Hub, dataset: Dataset) -> None:
    hub.create(NAME).ignored = "low_res/.*"
    with pytest.raises(UserError, match=r"3 files were sent and are not there, low_res/.* \.gitignore"):
        push(dataset, compare(dataset, Repository(NAME)))
    assert "README.md" not in hub.repos[NAME].files


def test_another_dataset_is_not_replaced(hub: Hub, dataset: Dataset, tmp_path: Path) -> None:
    push(dataset, compare(dataset, Repository(NAME)))
    hub.repos[NAME].files["config.yaml"] = b"name: other\n"
    for lenient in (False, True):
        with pytest.raises(UserError, match="holds the dataset 'other', which a push of 'demo' would replace"):
            compare(dataset, Repository(NAME), lenient=lenient)


def test_the_publishers_own_fields_of_the_card_stay(hub: Hub, dataset: Dataset) -> None:
    push(dataset, compare(dataset, Repository(NAME)))
    repo = hub.repos[NAME]
    stated = b"---\nlicense: cc-by-4.0\nlanguage:\n- en\ndataset_info: {}\npretty_name: my own\n---\nMy own text.\n"
    repo.files["README.md"] = stated.replace(b"\n", b"\r\n")
    work = compare(dataset, Repository(NAME))
    assert [file.name for file in work.due] == ["README.md"]
    push(dataset, work)
    ours = dataset.folder.read("README.md").decode()
    kept = "license: cc-by-4.0\nlanguage:\n- en\n"
    assert repo.files["README.md"].decode() == ours.replace("---\n\n#", f"{kept}---\n\n#", 1)
    assert compare(dataset, Repository(NAME)).due == ()
    for harm in (b"---\n{{{\n---\n", b"\xff\xfe", b"", b"---\n- a\n---\n", b"---\n1: 2\n---\n"):
        repo.files["README.md"] = harm
        assert compare(dataset, Repository(NAME)).texts["README.md"].decode() == ours


def test_only_what_was_published_is_pushed(hub: Hub, dataset: Dataset) -> None:
    for stage in dataset.hashes:
        name = layout.commit(stage, dataset.hashes[stage], 2)
        dataset.folder.remove(name)
    with pytest.raises(PlanError, match="has other commits than it was published from"):
        compare(dataset, Repository(NAME))
    dataset.folder.remove(layout.PUBLICATION)
    with pytest.raises(PlanError, match="is not published; run: resmaster publish"):
        compare(dataset, Repository(NAME))


def test_the_settings_make_the_same_stages_and_hold_no_place(tmp_path: Path) -> None:
    secret = tmp_path / "secret-folder"
    secret.mkdir()
    made = build(secret / "out", secret, ["a"])
    publish(made)
    text = shared(made).settings
    assert b"secret" not in text
    (tmp_path / "prompts.txt").write_text("a\n")
    (tmp_path / "again.yaml").write_bytes(text)
    config = load_config(str(tmp_path / "again.yaml"))
    assert replace(made, config=config).hashes == made.hashes
    assert yaml.safe_load(text)["prompts"] == "prompts.txt"
    assert not {"root", "dispatch", "limit"} & set(yaml.safe_load(text))


def test_shards_that_an_index_names_with_their_digest_go_along(hub: Hub, dataset: Dataset) -> None:
    """As an index of chosen samples has them: of its shards some are made from committed ones, and some are these."""
    made = described("curated/000000-00000000.tar", b"made")
    committed = next(file for file in shared(dataset).objects if file.name.startswith("high_res/"))
    items = [{"url": file.name, "filesize": file.bytes, "sha256": file.sha256} for file in (made, committed)]
    text = json.dumps({"shardlist": items}).encode()
    dataset.folder.write(made.name, b"made")
    dataset.folder.write("curated.json", text)
    record = read_publication(dataset.folder)
    assert record
    write_publication(dataset.folder, replace(record, files=(*record.files, described("curated.json", text))))
    push(dataset, compare(dataset, Repository(NAME)))
    assert held(hub.repos[NAME]) == contents(dataset)
    assert hub.repos[NAME].files[made.name] == b"made"
    assert len(hub.repos[NAME].files) == 19


def test_a_dataset_without_samples_is_not_pushed(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = planned(tmp_path / "out", ["a"], tmp_path)
    assert main(["publish", made.url, "--to", URL]) == 1
    assert "no sample is published, so nothing was pushed" in capsys.readouterr().err
    assert hub.requests == []


def test_what_is_not_finished_is_left_out(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = planned(tmp_path / "out", PROMPTS, tmp_path)
    for stage in made.hashes:
        run_stage(made, stage, 0, process=FAKES[stage])
    run_stage(made, "low_res", 1, process=FAKES["low_res"])
    assert main(["publish", made.url, "--to", URL]) == 0
    assert "2 shards are not finished" in capsys.readouterr().err
    assert {(layout.object_of(name) or ("", 0))[1] for name in held(hub.repos[NAME])} == {0}


def test_the_place_of_own_images_is_not_told_unannounced(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.png").write_bytes(png((number, 2, 3)))
    (folder / "1.txt").write_text("a cat")
    made = ingest(config_at(tmp_path / "out", images=str(folder)))
    for stage in made.hashes:
        run_stage(made, stage, 0, process=FAKES[stage])
    for option in (["--dry-run"], []):
        publish(made)
        assert main(["publish", made.url, "--to", URL, *option]) == 0
        shown = capsys.readouterr()
        assert (
            "source of manifest.parquet tells readers the path or address of each of your images"
            in shown.out + shown.err
        )
    files = held(hub.repos[NAME])
    assert "2 images of `photos`; 1 samples with a text beside the image, 1 without" in files["README.md"].decode()
    assert [name for name, content in files.items() if str(tmp_path).encode() in content] == ["manifest.parquet"]


def test_a_damaged_index_is_told(hub: Hub, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    dataset.folder.write("index.json", b"{")
    assert main(["publish", dataset.url, "--to", URL, "--dry-run"]) == 1
    assert "index.json is damaged (sha256 differs); run: resmaster verify" in capsys.readouterr().err
    assert main(["publish", dataset.url, "--to", URL]) == 0
    assert held(hub.repos[NAME]) == contents(dataset)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a shell starts in the background, tests included, ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_push_says_how_to_go_on(hub: Hub, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    """By SIGINT, while the second commit is on its way."""

    def hook(method: str, path: str) -> None:
        if path.startswith(COMMIT) and len(hub.repos[NAME].commits) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    hub.hook = hook
    assert main(["publish", dataset.url, "--to", URL]) == 130
    assert "what is done is kept: run the same command again to go on" in capsys.readouterr().err
    hub.hook = lambda method, path: None
    assert main(["publish", dataset.url, "--to", URL]) == 0
    assert held(hub.repos[NAME]) == contents(dataset)
    assert len(hub.uploads) == 13


def test_no_secret_is_told_or_logged(
    hub: Hub, dataset: Dataset, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults = [Fault("PUT", "/(lfs|part)/", 500, times=3), Fault("POST", COMMIT, 500, times=2)]
    with caplog.at_level(logging.DEBUG):
        assert main(["publish", dataset.url, "--to", URL]) == 0
    shown = capsys.readouterr()
    for secret in (TOKEN, SIGNATURE):
        assert secret not in shown.out + shown.err + caplog.text
        assert not any(secret.encode() in content for content in hub.repos[NAME].files.values())
    assert not any(TOKEN.encode() in path.read_bytes() for path in Path(dataset.url).rglob("*") if path.is_file())


@pytest.mark.s3
def test_a_dataset_on_s3_goes_through_a_bounded_scratch_folder(
    hub: Hub, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build(s3_root, tmp_path)
    publish(made)
    monkeypatch.setattr(hub_module, "WHOLE_BYTES", 2_000)  # of what git keeps
    scratch, most = tmp_path / "scratch", 0
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))

    def hook(method: str, path: str) -> None:
        nonlocal most
        most = max(most, sum(file.suffix in (".tar", ".parquet") for file in scratch.rglob("*")))

    hub.hook = hook
    push(made, compare(made, Repository(NAME)))
    assert held(hub.repos[NAME]) == contents(made)
    assert 0 < most <= 4, "three objects, or the entries"
    assert not [file for file in scratch.rglob("*") if file.is_file()]


LOADS = """
import datasets

for config, size in ((None, (64, 64)), ("low_res", (16, 16))):
    streamed = list(datasets.load_dataset("me/demo", config, split="train", streaming=True))
    loaded = datasets.load_dataset("me/demo", config, split="train")
    assert loaded.num_rows == len(streamed), loaded
    assert {row["png"].size for row in streamed} == {size}
    print("".join(row["txt"][0] for row in streamed))
"""


@pytest.mark.slow
def test_readers_load_it_by_name(hub: Hub, dataset: Dataset, tmp_path: Path) -> None:
    """By `load_dataset(NAME)`, streamed and downloaded, in a process of its own."""
    push(dataset, compare(dataset, Repository(NAME)))
    done = subprocess.run(
        [sys.executable, "-c", LOADS],
        env={**environment(hub), "HF_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "abcde\nabbcde\n"


def test_a_snapshot_is_the_publication_and_loads(hub: Hub, dataset: Dataset, tmp_path: Path) -> None:
    from datasets import load_dataset

    push(dataset, compare(dataset, Repository(NAME)))
    folder = huggingface_hub.snapshot_download(NAME, repo_type="dataset", local_dir=tmp_path / "copy")
    assert all(Path(folder, name).read_bytes() == content for name, content in contents(dataset).items())
    for config, texts in ((None, "abcde"), ("low_res", "abbcde")):
        rows = load_dataset(folder, config, split="train", streaming=True)
        assert "".join(row["txt"][0] for row in rows) == texts
    index = json.loads(Path(folder, "index.json").read_text())
    assert all(Path(folder, shard["url"]).stat().st_size == shard["filesize"] for shard in index["shardlist"])
