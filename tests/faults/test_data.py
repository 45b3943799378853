"""Tar shards that are cut short, hold unusable samples or are lost on the way, and runs on them that are killed."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from open_clip import SimpleTokenizer

from accel_clip import Config, cli
from accel_clip.config import DataConfig
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.batch import Batch
from accel_clip.data.examples import Preparation
from accel_clip.data.loader import BatchPlaces, TrainingPairs, iterate
from accel_clip.data.order import Order
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.resolve import open_source
from accel_clip.data.sources.shards import reader as shard_reader
from accel_clip.data.sources.shards.local import TarShards
from helpers import nasty
from helpers.commands import CPU_2, Finished
from helpers.comparison import ADDITIONS_OF_A_STEP, rounding
from helpers.launches import ALONE, SLOWLY, FolderOfLaunches, losses_by_step, status_of
from helpers.models import model_that_drops_patches
from helpers.runs import assert_same_end, config_that_draws, ends_of, in_a_process, run_to_the_end, run_until

BATCH, NUM_SHARDS = 12, 6


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nasty.write_wild_shards(tmp_path_factory.mktemp("wild") / "shards")


# --- the order and the pixels


def batches_of(source: Source, batches: range, num_workers: int, num_processes: int = 1) -> Iterator[tuple[Batch, ...]]:
    """Yield contrastive batches as the parts that the processes get."""
    order = Order(len(source), BATCH, seed=5)
    pairs = TrainingPairs(source, order, Preparation(SimpleTokenizer(), (48, 48), 50e6, order.seed))
    parts = [
        iterate(pairs, BatchPlaces(order, batches, process, num_processes), DataConfig(), num_workers, False)
        for process in range(num_processes)
    ]
    return zip(*parts, strict=True)


def fingerprint(parts: tuple[Batch, ...]) -> str:
    """Return a hash of samples, pixels and tokens of a contrastive batch, whoever loaded which part of it."""
    digest = hashlib.sha256()
    for field in ("sample", "image", "tokens"):
        for part in parts:
            digest.update(getattr(part, field).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def alone(wild: Path) -> list[tuple[Batch, ...]]:
    """Return the batches of a bit more than two epochs, loaded in this process."""
    source = open_source(str(wild), DataConfig())
    return list(batches_of(source, range(2 * (len(source) // BATCH) + 3), num_workers=0))


def test_what_is_loaded_is_varied_and_holds_unusable_samples(wild: Path, alone: list[tuple[Batch, ...]]) -> None:
    """Equality below means something."""
    num_samples = len(open_source(str(wild), DataConfig()))
    assert num_samples % BATCH != 0
    assert len({fingerprint(parts) for parts in alone}) == len(alone)
    met = {(bad.sample, bad.reason) for (batch,) in alone for bad in batch.bad_samples}
    assert len(met) > 15 and {"truncated_shard", "unreadable", "no_caption"} <= {reason for _, reason in met}
    for (batch,) in alone:
        assert len(set(batch.sample.tolist())) == BATCH and not {number for number, _ in met} & set(
            batch.sample.tolist()
        )


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_order_and_pixels_do_not_depend_on_workers_or_processes(
    wild: Path, alone: list[tuple[Batch, ...]], num_workers: int, num_processes: int
) -> None:
    source = open_source(str(wild), DataConfig())
    found = list(batches_of(source, range(len(alone)), num_workers, num_processes))
    assert [fingerprint(parts) for parts in found] == [fingerprint(parts) for parts in alone]
    for parts, (whole,) in zip(found, alone, strict=True):
        assert [bad for part in parts for bad in part.bad_samples] == list(whole.bad_samples)


def test_batches_from_the_middle_of_an_epoch_are_those_that_were_left(wild: Path, alone: list) -> None:
    source = open_source(str(wild), DataConfig())
    found = list(batches_of(source, range(3, len(alone)), num_workers=2, num_processes=2))
    assert [fingerprint(parts) for parts in found] == [fingerprint(parts) for parts in alone[3:]]


# --- killed runs


def tars(wild: Path, **settings: object) -> DataConfig:
    return DataConfig(train=[str(wild)], val_fraction=0.25, workers=2, max_bad_fraction=0.9, **settings)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model_that_drops_patches(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(wild: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = config_that_draws(model_folder, tmp_path_factory.mktemp("whole") / "run", data=tars(wild))
    run_to_the_end(config)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("faults", [["step:3", "step:8"], ["latest:8", "step:13"]], ids=" ".join)
def test_a_killed_run_on_shards_ends_like_one_that_was_not(
    wild: Path, model_folder: Path, tmp_path: Path, uninterrupted: Config, faults: list[str]
) -> None:
    config = config_that_draws(model_folder, tmp_path / "run", data=tars(wild))
    for fault in faults:
        run_until(config, fault)
    run_to_the_end(config)
    assert_same_end(config, uninterrupted)
    reasons = [json.loads(line)["reason"] for line in ends_of(config)[2].splitlines()]
    assert len(reasons) > 10 and "truncated_shard" in reasons


def on_shards(folder: Path, *more: str) -> tuple[str, ...]:
    words = ("--data.train", str(folder), "--data.workers", "2", "--data.max_bad_fraction", "0.9")
    return (*words, "--data.val_fraction", "0.25", *more)


@pytest.mark.slow
def test_two_killed_processes_on_shards_end_like_two_that_were_not_and_like_one(wild: Path, tmp_path: Path) -> None:
    folder = FolderOfLaunches(tmp_path, patch_dropout=0)  # which each process draws for itself
    words = on_shards(wild)
    for name, launcher in (("one", ALONE), ("two", CPU_2)):
        done = folder.finish(launcher, name, *words)
        assert done.code == 0, done.err
    assert folder.finish(CPU_2, "killed", *words, ACCEL_CLIP_FAULT="step:5").code != 0
    launch = folder.start(CPU_2, "killed", *words, **SLOWLY)
    launch.wait_for_step(9)
    launch.kill()
    assert "going on from" in launch.text()
    done = folder.finish(CPU_2, "killed", *words)
    assert done.code == 0, done.err
    one, two, killed = (Config(output_dir=str(tmp_path / name)) for name in ("one", "two", "killed"))
    assert_same_end(killed, two)
    assert ends_of(one)[2] == ends_of(two)[2] and len(ends_of(one)[2].splitlines()) > 8
    losses = losses_by_step(tmp_path / "two")
    assert losses == pytest.approx(losses_by_step(tmp_path / "one"), rel=rounding(len(losses) * ADDITIONS_OF_A_STEP))
    assert len({round(loss, 3) for loss in losses.values()}) > 6


# --- shards that are lost

LOSING = '''
import os
import shutil
from pathlib import Path

import torch
from accel_clip import LOSSES
from accel_clip.data.sources.shards import reader as shard_reader

shard_reader.MOST_OPEN_FILES = 2  # so that shards must be opened anew


def lose(shard, way):
    if way == "removed":
        shard.unlink()
    elif way == "replaced":
        other = shard.with_name("other")
        shutil.copy(shard.with_name("shard-3.tar"), other)
        other.replace(shard)
    elif way == "overwritten":
        shutil.copyfile(shard.with_name("shard-3.tar"), shard)
    elif way == "truncated":
        os.truncate(shard, shard.stat().st_size // 3)
    elif way == "pipe":
        shard.unlink()
        os.mkfifo(shard)


@LOSSES.register("losing")
class Losing:
    """The contrastive loss, in whose second step the first process loses a shard; its first call is a trial."""

    def __init__(self, way, shard):
        self.number, self.way, self.shard = -1, way, Path(shard)

    def __call__(self, image_features, text_features, logit_scale, output_dict=True):
        self.number += image_features.requires_grad
        if self.number == 2 and os.environ.get("RANK", "0") == "0":
            lose(self.shard, self.way)
        logits = logit_scale * image_features @ text_features.T
        return {"one_loss": torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))}
'''
WAYS = {
    "removed": "missing_file",
    "replaced": "truncated_shard",
    "overwritten": "truncated_shard",
    "truncated": "truncated_shard",
    "pipe": "truncated_shard",
}
LOST = 1
STEPS_AN_EPOCH, NUM_EPOCHS = 6, 3


def losing(tmp_path: Path, way: str, num_workers: int, max_bad_fraction: float) -> tuple[FolderOfLaunches, list[str]]:
    """Return a folder with six shards of eight samples, and the words for three epochs in which one shard is lost."""
    folder = FolderOfLaunches(tmp_path)
    nasty.write_cut_shards(tmp_path / "shards", NUM_SHARDS, 8)
    (tmp_path / "losing.py").write_text(LOSING)
    options = {"way": way, "shard": str(tmp_path / "shards" / f"shard-{LOST}.tar")}
    words = ["--plugins", "losing.py", "--loss.name", "losing", "--loss.options", json.dumps(options)]
    words += ["--data.train", "shards", "--data.workers", str(num_workers), "--data.prefetch", "1"]
    words += ["--data.max_bad_fraction", str(max_bad_fraction), "--train.steps", str(STEPS_AN_EPOCH * NUM_EPOCHS)]
    return folder, words


def finish(folder: FolderOfLaunches, launcher: tuple[str, ...], run: str, words: list[str]) -> Finished:
    """Run to the end by a real launch, or in a fork of this process, which has imported everything."""
    if launcher:
        return folder.finish(launcher, run, *words)
    said = folder.path / "said.txt"

    def train_alone() -> None:
        os.chdir(folder.path)
        with said.open("wb") as file:
            os.dup2(file.fileno(), sys.stderr.fileno())
        sys.argv = ["train.py", *folder.words(run, *words)]
        sys.exit(cli.train_main())

    code = in_a_process(train_alone)
    return Finished(code, "", said.read_text())


def listed(run: Path) -> dict[int, dict[str, str]]:
    """Return what is wrong with which samples."""
    lines = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    found = {line["sample"]: line for line in lines}
    assert len(found) == len(lines), "a sample is listed twice"
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "launcher", "num_workers"),
    [
        *((way, ALONE, 0) for way in WAYS),
        ("removed", CPU_2, 0),
        ("truncated", CPU_2, 2),
    ],
    ids=lambda value: value if isinstance(value, str | int) else f"{len(value) or 1} process(es)",
)
def test_a_shard_that_is_lost_costs_its_samples_alone(
    tmp_path: Path, way: str, launcher: tuple[str, ...], num_workers: int
) -> None:
    folder, words = losing(tmp_path, way, num_workers, max_bad_fraction=0.9)
    done = finish(folder, launcher, "run", words)
    assert done.code == 0, done.err
    assert list(losses_by_step(tmp_path / "run")) == list(range(1, STEPS_AN_EPOCH * NUM_EPOCHS + 1))
    found = listed(tmp_path / "run")
    lost = range(8 * LOST, 8 * (LOST + 1))
    cut = [8 * shard + 7 for shard in range(NUM_SHARDS)]  # the last sample of each shard
    assert set(found) == {*lost, *cut}
    shard = str(tmp_path / "shards" / f"shard-{LOST}.tar")
    for sample in lost:
        assert found[sample]["path"] == shard
        assert found[sample]["reason"] == WAYS[way] or sample in cut
    (last,) = [line for line in done.err.splitlines() if "unusable samples so far" in line][-1:]
    counts = Counter(line["reason"] for line in found.values())
    assert ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items())) in last


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ALONE, CPU_2], ids=["1", "2"])
def test_more_lost_samples_than_allowed_stop_the_run(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    folder, words = losing(tmp_path, "removed", num_workers=2, max_bad_fraction=0.2)  # without the loss it is 0.125
    done = finish(folder, launcher, "run", words)
    assert done.code == 3 if launcher == ALONE else done.code != 0
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert status["step"] % STEPS_AN_EPOCH == 0 and "data.max_bad_fraction = 0.2" in status["error"]
    assert "missing_file" in status["error"] and done.err.count("accel-clip: error:") == 1


def met_by_fresh_workers(source: Source) -> dict[int, str]:
    """Return the unusable samples that workers meet which have opened no shard so far, and their details."""
    batches = batches_of(source, range(len(source) // BATCH), num_workers=2)
    return {bad.sample: bad.detail for (batch,) in batches for bad in batch.bad_samples}


@pytest.mark.parametrize("way", ["removed", "replaced", "truncated", "pipe"])
def test_workers_that_never_saw_a_lost_shard_count_its_samples(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reader, "WAITS_SECONDS", (0.0, 0.0, 0.0))
    folder = nasty.write_cut_shards(tmp_path / "shards", NUM_SHARDS, 8)
    source = open_source(str(folder), DataConfig())
    assert [source[8 * shard].captions for shard in range(NUM_SHARDS)]  # all are open here, and none in the workers
    namespace: dict[str, Callable[[Path, str], None]] = {}
    exec(LOSING[: LOSING.index("@LOSSES")].replace("shard_reader.MOST_OPEN_FILES = 2", ""), namespace)
    namespace["lose"](folder / f"shard-{LOST}.tar", way)
    met = met_by_fresh_workers(source)
    assert set(met) == {*range(8 * LOST, 8 * (LOST + 1)), *(8 * shard + 7 for shard in range(NUM_SHARDS))}


def test_a_shard_that_is_written_anew_in_its_place_gives_no_foreign_bytes(tmp_path: Path) -> None:
    """Its file is open, of the size that it had, and holds other samples."""
    folder = nasty.write_cut_shards(tmp_path / "shards", 2, 8)
    source = open_source(str(folder), DataConfig())
    assert isinstance(source, TarShards)
    first = folder / "shard-0.tar"
    assert source[0].captions == ("picture 0_0 of noise",)
    content = bytearray(first.read_bytes())
    content[content.index(b"picture 0_0")] = ord("P")
    status = first.stat()
    with first.open("r+b") as file:
        file.write(content)
    os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert first.stat().st_size == status.st_size
    for _ in range(2):
        with pytest.raises(UnusableSample, match="changed"):
            source[0]
    assert source[8].captions == ("picture 1_0 of noise",)
