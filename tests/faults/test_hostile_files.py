"""Files of ours that somebody else wrote, hashes and all: told by file and key, set aside, or made anew."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from accel_clip.checkpoint.contents import check_run
from accel_clip.checkpoint.find import find_best, find_newest, find_whole, open_checkpoint
from accel_clip.checkpoint.folders import BEST, newest_first, point
from accel_clip.checkpoint.manifest import Checkpoint, InvalidCheckpoint, make_manifest, verify
from accel_clip.checkpoint.restore import restore_random
from accel_clip.checkpoint.saved_state import SavedState
from accel_clip.commands.plots import read_points
from accel_clip.commands.train import train
from accel_clip.config import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, TrainConfig
from accel_clip.data.caches.features import FeatureCache
from accel_clip.data.caches.pictures import PictureCache
from accel_clip.data.sources.resolve import open_labelled, open_source
from accel_clip.data.sources.shards.local import written_sizes
from accel_clip.data.sources.shards.tar_index import build_index, load_index, pack, side_files
from accel_clip.faults import ConfigError, DataError
from accel_clip.files.marked import read_mark
from accel_clip.models.export import read_metrics
from accel_clip.run.folder import RunFolder
from accel_clip.run.resume import decide
from accel_clip.typed_json import WrongContent, read_json
from helpers.models import small_model

ODD: list[Any] = [None, True, -1, 1.5, math.nan, math.inf, 10**400, 2**63, "x", "x" * 10**6, [], {}, [[]], {"a": 1}]
TEXTS = [b"", b"\xff", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"NaN", b"{}", b"[]", b"null", b"{'a': 1}"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a short run with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    train(config_for(folder, steps=2))
    return folder / "run"


def config_for(folder: Path, steps: int) -> Config:
    return Config(
        output_dir=str(folder / "run"),
        data=DataConfig(train=["demo:pairs"], workers=0),
        model=ModelConfig(small_model(folder)),
        train=TrainConfig(steps=steps, batch_size=8, threads=1),
        eval=EvalConfig(batch_size=8),
        checkpoint=CheckpointConfig(every=1),
    )


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def rewrite(checkpoint: Path, file: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of a checkpoint and make the manifest agree with it again."""
    content = json.loads((checkpoint / file).read_text())
    changed = change(content)
    (checkpoint / file).write_text(json.dumps(content if changed is None else changed))
    sign(checkpoint)


def sign(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(make_manifest(checkpoint, manifest["step"], manifest["num_processes"]))


def put(path: str, value: Any) -> Callable[[Any], None]:
    """Return what puts a value at a dotted path."""

    def change(content: Any) -> None:
        *front, last = path.split(".")
        for name in front:
            content = content[int(name) if isinstance(content, list) else name]
        content[int(last) if isinstance(content, list) else last] = value

    return change


# --- state.json


PLACES = [
    *("run", "run.step", "run.next_batch", "run.metrics", "run.num_pairs", "run.stop_asked", "run.evaluated_step"),
    *("data", "data.num_samples", "data.streams", "meters", "meters.means", "meters.totals", "bad_samples.counts"),
    *("bad_samples", "bad_samples.num_seen", "bad_samples.listed", "stopping", "watched", "scaler", "file_sizes"),
    *(
        "plan",
        "plan.threads",
        "plan.micro_batch_size",
        "plan.kept",
        "config",
        "config.model",
        "model",
        "model.model_config",
    ),
    *("resume", "inputs", "inputs.files", "inputs.sources"),
]
MAY_BE: dict[str, Callable[[Any], bool]] = {
    "run": lambda value: isinstance(value, dict),
    "run.metrics": lambda value: value in ({}, {"a": 1}),
    "run.num_pairs": lambda value: value in ({}, {"a": 1}),
    "meters.means": lambda value: value == {},
    "meters.totals": lambda value: value == {},
    "bad_samples.counts": lambda value: value in ({}, {"a": 1}),
    "bad_samples.listed": lambda value: value == [],
    "data.streams": lambda value: value == [],
    "file_sizes": lambda value: value in ({}, {"a": 1}),
    "plan.kept": lambda value: value in ({}, {"a": 1}),
    "model.model_config": lambda value: isinstance(value, dict),
    "scaler": lambda value: value is None or value in ({}, {"a": 1}),
    "watched": lambda value: value in (None, "x"),
    "run.evaluated_step": lambda value: value is None,
    "run.stop_asked": lambda value: value is True,
    "resume": lambda value: value in (None, "x"),
    "inputs": lambda value: value is None,
    "inputs.files": lambda value: value == {},
    "inputs.sources": lambda value: value == {},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_state_of_another_kind_names_its_key(place: str, trained: Path, tmp_path: Path) -> None:
    state = json.loads((newest_first(trained / "checkpoints")[0] / "state.json").read_text())
    for value in ODD:
        if place in MAY_BE and MAY_BE[place](value):
            continue
        changed = json.loads(json.dumps(state))
        put(place, value)(changed)
        (tmp_path / "state.json").write_text(json.dumps(changed))
        try:
            read_json(tmp_path / "state.json", SavedState)
        except WrongContent as error:
            assert str(error).startswith(f"state.json: {place}") and len(str(error)) < 600, error
        else:
            raise AssertionError(f"{place}: {value!r:.80} was taken")


@pytest.mark.parametrize("place", PLACES)
def test_a_state_that_lacks_a_part_names_it(place: str, trained: Path, tmp_path: Path) -> None:
    state = json.loads((newest_first(trained / "checkpoints")[0] / "state.json").read_text())
    if place.startswith("run.") or place in ("model.model_config", "resume", "inputs"):  # which may be left out
        return
    *front, last = place.split(".")
    inner = state
    for name in front:
        inner = inner[name]
    del inner[last]
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(WrongContent, match=rf"state\.json: {place}: None does not work: it is missing"):
        read_json(tmp_path / "state.json", SavedState)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "run.step": lambda path: rewrite(path, "state.json", put("run.step", 10**9)),
    "run.next_batch": lambda path: rewrite(path, "state.json", put("run.next_batch", -1)),
    "next_batch ahead": lambda path: rewrite(path, "state.json", put("run.next_batch", 10**9)),
    "next_batch behind": lambda path: rewrite(path, "state.json", put("run.next_batch", 1)),
    "evaluated_step": lambda path: rewrite(path, "state.json", put("run.evaluated_step", 3)),
    "no object": lambda path: rewrite(path, "state.json", lambda state: [state]),
    "lacks run": lambda path: rewrite(path, "state.json", lambda state: {**state, "run": None}),
    "optimizer list": lambda path: rewrite(path, "optimizer.json", lambda state: []),
    "optimizer dtype": lambda path: rewrite(path, "optimizer.json", lambda state: {"dtype": "load"}),
    "optimizer no dtype": lambda path: rewrite(path, "optimizer.json", lambda state: {"dtype": "nothing"}),
    "optimizer tensor": lambda path: rewrite(path, "optimizer.json", lambda state: {"tensor": "nowhere"}),
    "optimizer tensor list": lambda path: rewrite(path, "optimizer.json", lambda state: {"tensor": ["x"]}),
    "optimizer kind": lambda path: rewrite(path, "optimizer.json", lambda state: {"call": "os.system"}),
    "optimizer two kinds": lambda path: rewrite(path, "optimizer.json", lambda state: {"tuple": [], "dtype": ""}),
    "optimizer mapping": lambda path: rewrite(path, "optimizer.json", lambda state: {"mapping": [[[], 1]]}),
    "optimizer mapping of numbers": lambda path: rewrite(path, "optimizer.json", lambda state: {"mapping": 7}),
    "optimizer without groups": lambda path: rewrite(path, "optimizer.json", lambda state: {"mapping": []}),
    "optimizer header": lambda path: (path / "optimizer.safetensors").write_bytes(b"\xff" * 20) and sign(path),
    "weights header": lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 20) and sign(path),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_checkpoint_with_right_hashes_and_wrong_contents_is_set_aside(
    kind: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(trained / "checkpoints", tmp_path / "checkpoints")
    last = newest_first(folder)[0]
    HOSTILE[kind](last)
    assert verify(last).step == 2  # sizes and hashes are those of the manifest

    def look(checkpoint: Checkpoint) -> None:
        check_run(checkpoint, batches_per_step=1, is_exact=True)

    point(folder, BEST, 2)
    assert find_best(folder, look) is None
    whole = find_whole(folder, look)
    with pytest.raises(ConfigError, match=r"^checkpoint\.resume: .*(state|optimizer|model)\."):
        open_checkpoint(last, look)
    capsys.readouterr()
    found = find_newest(folder, look)
    (line,) = capsys.readouterr().err.splitlines()
    assert found is not None and whole is not None and found.step == whole.step == 1
    assert "step-00000002" in line and "step-00000001 is used instead" in line
    assert not last.exists()


def test_steps_of_several_batches_are_counted(trained: Path, tmp_path: Path) -> None:
    path = copy(newest_first(trained / "checkpoints")[0], tmp_path / "step-00000002")
    rewrite(path, "state.json", put("run.next_batch", 8))
    check_run(verify(path), batches_per_step=4, is_exact=True)
    check_run(verify(path), batches_per_step=2)  # rolled back past two steps' batches
    for batches, is_exact in ((2, True), (3, False), (5, False)):
        with pytest.raises(InvalidCheckpoint, match=r"run\.next_batch is 8"):
            check_run(verify(path), batches, is_exact)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run.step", "next_batch ahead", "optimizer dtype"])
def test_a_run_goes_on_from_the_checkpoint_before(
    kind: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(trained, tmp_path / "run")
    HOSTILE[kind](newest_first(tmp_path / "run" / "checkpoints")[0])
    result = train(moved(trained, tmp_path, 3))
    said = capsys.readouterr().err
    assert result.num_steps == 3 and "step-00000001 is used instead" in said


def moved(trained: Path, folder: Path, steps: int) -> Config:
    """Return the settings of the run in another folder, which continue it."""
    return replace(config_for(trained.parent, steps), output_dir=str(folder / "run"))


@pytest.mark.slow
def test_rates_in_a_checkpoint_that_the_settings_do_not_say_are_refused(trained: Path, tmp_path: Path) -> None:
    copy(trained, tmp_path / "run")

    def faster(state: Any) -> Any:
        return json.loads(json.dumps(state).replace('["peak_lr", 0.0005]', '["peak_lr", 5000.0]'))

    for path in newest_first(tmp_path / "run" / "checkpoints"):
        rewrite(path, "optimizer.json", faster)
        assert "5000.0" in (path / "optimizer.json").read_text()
    with pytest.raises(ConfigError, match="peak_lr"):
        train(moved(trained, tmp_path, 3))


@pytest.mark.parametrize("change", ["dtype", "shape", "values"])
def test_random_states_that_are_none_are_left_out(change: str, trained: Path, tmp_path: Path) -> None:
    path = copy(newest_first(trained / "checkpoints")[0], tmp_path / "step-00000002")
    states = load_file(path / "random-0.safetensors")
    of_cpu = states["cpu"]
    changed = {"dtype": of_cpu.float(), "shape": of_cpu[:8], "values": torch.full_like(of_cpu, 255)}[change]
    save_file({"cpu": changed}, path / "random-0.safetensors")
    sign(path)
    before = torch.get_rng_state()
    assert restore_random(verify(path), 0, torch.device("cpu")) is False
    assert torch.equal(torch.get_rng_state(), before)


# --- STATUS.json, config.yaml, metrics, marks


@pytest.mark.parametrize(
    "text", [*TEXTS, *(json.dumps({"state": "complete", "step": value}).encode() for value in ODD)]
)
def test_a_status_of_another_kind_is_not_complete(text: bytes, trained: Path, tmp_path: Path) -> None:
    copy(trained, tmp_path / "run")
    config = moved(trained, tmp_path, 2)
    assert decide(config).kind == "complete"
    (tmp_path / "run" / "STATUS.json").write_bytes(text)
    assert decide(config).kind == "goes on" and RunFolder(tmp_path / "run").read_status() == {}


@pytest.mark.parametrize("text", TEXTS, ids=len)
def test_other_files_of_another_kind_are_told(text: bytes, tmp_path: Path) -> None:
    for name in ("metrics.json", "metrics.jsonl", ".accel_clip.json", "sizes.json", "config.yaml"):
        (tmp_path / name).write_bytes(text)
    assert read_mark(tmp_path) is None
    if text != b"{}":
        with pytest.raises(ConfigError, match=r"metrics\.json"):
            read_metrics(tmp_path)
        assert written_sizes(tmp_path / "sizes.json") == {}
    if text:
        with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 1"):
            read_points(tmp_path / "metrics.jsonl")


def test_numbers_of_other_files_are_looked_at(tmp_path: Path) -> None:
    for value in (-1, 1e400, True, "1", [1], 2**70):
        (tmp_path / "sizes.json").write_text(json.dumps({"a.tar": value}))
        assert written_sizes(tmp_path / "sizes.json") == {}
        (tmp_path / ".accel_clip.json").write_text(json.dumps({"kind": "export", "files": {"a": [value]}}))
        assert read_mark(tmp_path) is None
    (tmp_path / "metrics.json").write_text('{"val/loss": "low"}')
    with pytest.raises(ConfigError, match=r"metrics\.json: val/loss: 'low'"):
        read_metrics(tmp_path)


def test_pipes_and_endless_files_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "STATUS.json")
    assert RunFolder(tmp_path).read_status() == {}
    with pytest.raises(WrongContent, match="more than 100 bytes"):
        (tmp_path / "x.json").write_bytes(b" " * 101)
        read_json(tmp_path / "x.json", Any, 100)
    with pytest.raises(WrongContent, match="not a file"):
        read_json(Path("/dev/zero"), Any)


# --- tables


METADATA: list[Any] = [
    {"info": {"features": {"label": {"names": value}}}}
    for value in (1, "ab", [1], [None], {"a": 1}, True, ["x" * 10**6])
] + [{"info": []}, {"info": {"features": []}}, {"info": "x"}, [], 7]
LENIENT: list[Any] = [{}, {"info": {}}, {"info": {"features": {}}}]


def table_with(metadata: bytes, folder: Path) -> str:
    table = pyarrow.table({"image": ["a.png", "b.png"], "caption": ["x", "y"], "label": [0, 1]})
    parquet.write_table(table.replace_schema_metadata({b"huggingface": metadata}), folder / "pairs.parquet")
    return str(folder / "pairs.parquet")


@pytest.mark.parametrize(
    "metadata", [*(json.dumps(each).encode() for each in METADATA if each is not None), *TEXTS[:6]]
)
def test_metadata_of_tables_are_read_narrowly(metadata: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs\.parquet: in its metadata 'huggingface'"):
        open_labelled(table_with(metadata, tmp_path), DataConfig(), "label")


@pytest.mark.parametrize("metadata", LENIENT, ids=str)
def test_metadata_without_names_are_fine(metadata: Any, tmp_path: Path) -> None:
    assert len(open_source(table_with(json.dumps(metadata).encode(), tmp_path), DataConfig())) == 2


# --- caches


def features(folder: Path, **about: Any) -> Path:
    folder.mkdir(exist_ok=True)
    content = {"fingerprint": {"weights": "x"}, "unusable": {"3": ["unreadable", "no", None]}, **about}
    (folder / "about.json").write_text(json.dumps(content))
    numpy.save(folder / "keys.npy", numpy.arange(4))
    numpy.save(folder / "stamps.npy", numpy.zeros(4, numpy.uint64))
    numpy.save(folder / "places.npy", numpy.arange(4))
    numpy.save(folder / "features.npy", numpy.zeros((4, 2), numpy.float32))
    return folder


@pytest.mark.parametrize("key", ["fingerprint", "unusable"])
def test_an_about_of_another_kind_is_no_cache(key: str, tmp_path: Path) -> None:
    assert FeatureCache(features(tmp_path / "x")).what_changed({"weights": "x"}) == []
    for value in [*ODD, {"a": []}, {"a": ["x", "y", 3]}, {"1": ["no reason", "x", None]}, {"1e400": ["x", "y", None]}]:
        if value == {} or (key == "fingerprint" and value == {"a": 1}):
            continue
        assert FeatureCache.if_whole(features(tmp_path / "x", **{key: value})) is None, value
    for text in TEXTS:
        (features(tmp_path / "x") / "about.json").write_bytes(text)
        assert FeatureCache.if_whole(tmp_path / "x") is None


@pytest.mark.parametrize(
    "arrays",
    [
        {"keys": numpy.zeros(4, numpy.int64)},
        {"keys": numpy.arange(4.0)},
        {"keys": numpy.zeros((4, 1), numpy.int64)},
        {"keys": numpy.arange(3)},
        {"stamps": numpy.zeros(4)},
        {"places": numpy.array([0, 1, 2, 4])},
        {"places": numpy.array([0, 1, 2, -1])},
        {"features": numpy.zeros(4, numpy.float32)},
        {"features": numpy.zeros((4, 2))},
        {"features": numpy.array([[None, 1]] * 4, object)},
    ],
)
def test_arrays_of_another_kind_are_no_cache(arrays: dict[str, numpy.ndarray], tmp_path: Path) -> None:
    folder = features(tmp_path / "x")
    for name, array in arrays.items():
        numpy.save(folder / f"{name}.npy", array, allow_pickle=True)
    assert FeatureCache.if_whole(folder) is None


@pytest.mark.parametrize(
    "places", [[[0, 3, 1, 1], [4, 3, 1, 1]], [[0, 2**40, 2**40, 1]], [[-1, 3, 1, 1]], [[0, 3, 1]], [[0, 3, 1, -1]]]
)
def test_places_of_pictures_lie_one_after_the_other(places: list[list[int]], tmp_path: Path) -> None:
    folder = features(tmp_path / "x")
    (folder / "pixels.bin").write_bytes(b"\0" * 6)
    numpy.save(folder / "keys.npy", numpy.arange(2))
    numpy.save(folder / "stamps.npy", numpy.zeros(2, numpy.uint64))
    numpy.save(folder / "places.npy", numpy.array([[0, 3, 1, 1], [3, 3, 1, 1]]))
    assert PictureCache(folder).what_changed({"weights": "x"}) == []
    numpy.save(folder / "places.npy", numpy.array(places))
    assert PictureCache.if_whole(folder) is None


# --- indexes of shards


def shard(folder: Path) -> Path:
    with tarfile.open(folder / "x.tar", "w") as archive:
        for name in ("a.png", "a.txt", "b.png", "b.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    return folder / "x.tar"


def change_member(field: str, value: int) -> Callable[[Any], None]:
    return lambda index: index.members[field].__setitem__(1, value)


WRONG_INDEXES: dict[str, Callable[[Any], None]] = {
    "size -1": change_member("size", -1),
    "size of exabytes": change_member("size", 2**62),
    "offset before the file": change_member("offset", -512),
    "offset past the file": change_member("offset", 2**62),
    "overlap": change_member("offset", 0),
    "extension": change_member("extension", 9),
    "sample": change_member("sample", 9),
    "keys of no letters": lambda index: index.key_ends.__setitem__(0, 0),
    "keys past the end": lambda index: index.key_ends.__setitem__(1, 2**31),
}


@pytest.mark.parametrize("kind", WRONG_INDEXES)
def test_a_wrong_index_is_made_anew(kind: str, tmp_path: Path) -> None:
    path = shard(tmp_path)
    index = build_index(path)
    side_files(path)[0].write_bytes(pack(index))
    assert load_index(path) is not None
    WRONG_INDEXES[kind](index)
    side_files(path)[0].write_bytes(pack(index))
    start = time.process_time()
    assert load_index(path) is None
    assert len(open_source(str(path), DataConfig())) == 2
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "key", ["num_members", "num_samples", "num_bytes", "checksum", "version", "mtime_ns", "extensions"]
)
def test_a_wrong_head_of_an_index_is_made_anew(key: str, tmp_path: Path) -> None:
    path = shard(tmp_path)
    line, _, arrays = pack(build_index(path)).partition(b"\n")
    for value in [*ODD, 10**12, -(10**12), 0, 1]:
        head = {**json.loads(line), key: value}
        if head == json.loads(line):
            continue
        side_files(path)[0].write_bytes(json.dumps(head).encode() + b"\n" + arrays)
        assert load_index(path) is None, value


def test_an_index_larger_than_its_shard_is_not_read(tmp_path: Path) -> None:
    path = shard(tmp_path)
    with side_files(path)[0].open("wb") as file:
        file.truncate(2**36)
    start = time.process_time()
    assert load_index(path) is None
    assert time.process_time() - start < 1
