"""`accel-clip check` and training build one run, and a start looks at its folder and its data once."""

from __future__ import annotations

import io
import json
import multiprocessing
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from accel_clip import SOURCES, Config, cli, train
from accel_clip.command_line import save_config
from accel_clip.commands.check.command import look_at_everything_named
from accel_clip.commands.check.parts import PlannedParts, planned_parts
from accel_clip.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    StopConfig,
    TrackConfig,
    TrainConfig,
)
from accel_clip.data.examples import preparation_for
from accel_clip.data.feed_parts import LoaderRank
from accel_clip.data.sources.base import Pair
from accel_clip.faults import ConfigError, DataError
from accel_clip.files.names import REPLACED, beside
from accel_clip.process.accelerator import process_as_found
from accel_clip.run.problems import Problems
from accel_clip.run.resume import decide
from helpers.models import small_model
from helpers.patience import HANG_SECONDS

NUM_PAIRS, BATCH, NUM_STEPS = 48, 8, 2
forked = multiprocessing.get_context("fork")


class Recorded:
    """Coloured pictures that note which of them was fetched."""

    name = "recorded"

    def __init__(self, fetched: list[int]) -> None:
        self.fetched = fetched

    def __len__(self) -> int:
        return NUM_PAIRS

    def __getitem__(self, index: int) -> Pair:
        self.fetched.append(index)
        colour = (5 * index, 255 - 5 * index, index)
        return Pair(Image.new("RGB", (40, 36), colour), (f"picture {index} of colour {colour}",))

    def key(self, index: int) -> str:
        return f"picture {index}"


@pytest.fixture
def fetched(own_plugins: None) -> list[int]:
    """Return the list that the registered source `recorded` notes in what was fetched."""
    found: list[int] = []

    @SOURCES.register("recorded")
    def recorded(argument: str, options: Any) -> Recorded:
        return Recorded(found)

    return found


def config_for(folder: Path, train_on: str, **sections: Any) -> Config:
    """Return settings of a run that trains its temperature alone, and whose micro-batches are small."""
    config = Config(
        output_dir=str(folder / "run"),
        data=DataConfig(train=[train_on], val_fraction=0.25, workers=0),
        model=ModelConfig(small_model(folder), freeze=["image", "text"]),
        optim=OptimConfig(warmup=0),
        train=TrainConfig(batch_size=BATCH, steps=NUM_STEPS, threads=1, micro_batch_size=3),
        eval=EvalConfig(every=100),
        track=TrackConfig(to=[]),
    )
    return replace(config, **sections)


def checked_parts(config: Config, folder: Path) -> PlannedParts:
    """Return the parts of a run as a check builds them."""
    problems = Problems()
    start = look_at_everything_named(config, problems)
    assert start is not None
    parts = planned_parts(start, 1, problems, folder / "indexes")
    assert parts is not None, problems.messages()
    return parts


def last_checkpoint(config: Config) -> Path:
    return max(Path(config.output_dir, "checkpoints").glob("step-*"))


def test_check_and_training_build_the_same_run(fetched: list[int], tmp_path: Path) -> None:
    """Weights, order and metrics are those of a training that knows nothing of the check, to the last bit."""
    config = config_for(tmp_path, "recorded")
    with process_as_found():
        parts = checked_parts(config, tmp_path)
        fetched.clear()
        metrics = parts.evaluator.run()
        preparation = preparation_for(parts.model, config)
        batches = parts.data.feed.open(range(NUM_STEPS), LoaderRank(0, 1, parts.num_workers, False), preparation)
        samples = [int(sample) for batch in islice(batches, NUM_STEPS) for sample in batch.sample]
        by_check, weights = list(fetched), {key: value.clone() for key, value in parts.model.clip.state_dict().items()}
    fetched.clear()
    assert not Path(config.output_dir).exists() and len(samples) == NUM_STEPS * BATCH

    result = train(config)
    first, last = (json.loads(line) for line in Path(config.output_dir, "metrics.jsonl").read_text().splitlines()[::2])
    assert first["step"] == 0 and {key: first[key] for key in metrics} == metrics
    assert parts.evaluator.metric_names() == set(metrics) == set(result.metrics) - {"step"}
    places = range(len(fetched) - len(by_check) + 1)
    assert any(fetched[place : place + len(by_check)] == by_check for place in places)
    exported = load_file(result.export / "open_clip_model.safetensors")
    assert exported.keys() == weights.keys()
    differing = [name for name in weights if not torch.equal(weights[name], exported[name])]
    assert differing == ["logit_scale"]
    saved = json.loads((last_checkpoint(config) / "state.json").read_text())["plan"]
    assert {key: saved[key] for key in asdict(parts.plan)} == asdict(parts.plan) and parts.plan.micro_batch_size == 3
    assert result.num_steps == last["step"] == parts.data.timetable.num_steps == NUM_STEPS


def test_training_ends_with_the_first_mistake_and_a_check_tells_all(fetched: list[int], tmp_path: Path) -> None:
    config = config_for(
        tmp_path,
        "recorded",
        data=DataConfig(train=["recorded", "missing.csv", "gone.csv"]),
        model=ModelConfig(small_model(tmp_path), freeze=["image", "nothing", "nobody"]),
        optim=OptimConfig(lr_by_name={"nowhere": 1e-3, "never": 1e-3}),
        train=TrainConfig(batch_size=9, steps=1, threads=1),
    )
    problems = Problems()
    with process_as_found():
        start = look_at_everything_named(config, problems)
        assert start is not None and planned_parts(start, 2, problems, tmp_path / "indexes") is None
    mistakes = ("missing.csv", "gone.csv", "train.batch_size: 9", "'nothing'", "'nobody'", "'nowhere'", "'never'")
    assert [sum(f"{each}" in message for message in problems.messages()) for each in mistakes] == [1] * len(mistakes)
    assert len(problems) == len(mistakes)
    with pytest.raises(DataError, match=r"missing\.csv"):
        train(config)
    with pytest.raises(ConfigError, match="'nothing' matches no parameter"):
        train(replace(config, data=DataConfig(train=["recorded"], workers=0)))
    assert not Path(config.output_dir).exists()


def test_a_metric_that_is_not_measured_is_told_beside_what_keeps_the_optimizer(
    fetched: list[int], tmp_path: Path
) -> None:
    """Both are found after the model was built, and neither hides the other."""
    stop, optim = StopConfig(metric="val/nothing"), OptimConfig(lr_by_name={"nowhere": 1e-3, "never": 1e-3})
    config = config_for(tmp_path, "recorded", stop=stop, optim=optim)
    problems = Problems()
    with process_as_found():
        start = look_at_everything_named(config, problems)
        assert start is not None and planned_parts(start, 1, problems, tmp_path / "indexes") is None
    assert [message.partition(":")[0] for message in problems.messages()] == [
        *("optim.lr_by_name", "optim.lr_by_name", "stop.metric")
    ]


# --- what a start reads


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return the settings of a run on shards, written as a file `own.yaml`, that has come to its end."""
    folder = tmp_path_factory.mktemp("finished")
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in range(NUM_PAIRS // 2):
                picture = io.BytesIO()
                Image.fromarray(numpy.full((36, 40, 3), 5 * number + shard, numpy.uint8)).save(picture, "PNG")
                for ending, content in (("png", picture.getvalue()), ("txt", f"grey {number} {shard}".encode())):
                    member = tarfile.TarInfo(f"{shard}-{number}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    config = config_for(folder, str(folder / "*.tar"), checkpoint=CheckpointConfig(keep=9))
    save_config(config, folder / "own.yaml")
    counts = run_observed(lambda: train(config), folder)
    assert (counts["shards"], "config" in counts) == (1, False)
    return config


def run_observed(action: Callable[[], object], folder: Path) -> dict[str, int]:
    """Return how often an action, in a process of its own, read the folder's settings and looked for the shards."""

    def run() -> None:
        torch.set_num_threads(1)
        counts: Counter[str] = Counter()
        sys.addaudithook(lambda event, arguments: counts.update(observed(event, arguments, folder)))
        action()
        (folder / "counts.json").write_text(json.dumps(counts))

    process = forked.Process(target=run)
    process.start()
    process.join(HANG_SECONDS)
    assert process.exitcode == 0
    counts: dict[str, int] = json.loads((folder / "counts.json").read_text())
    return counts


def observed(event: str, arguments: tuple[Any, ...], folder: Path) -> Iterator[str]:
    """Yield what an event of Python's is, where it is one of those that are counted."""
    if event == "open" and str(arguments[0]) == str(folder / "run" / "config.yaml") and arguments[1] in ("r", "rb"):
        yield "config"
    if event == "open" and str(arguments[0]).endswith("state.json") and arguments[1] in ("r", "rb"):
        yield Path(str(arguments[0])).parent.name
    if event == "glob.glob" and str(arguments[0]) == str(folder / "*.tar"):
        yield "shards"


def command(*words: str) -> Callable[[], object]:
    """Return an action that runs a command; what ends without success ends its process so."""

    def run() -> None:
        sys.argv = ["accel-clip", *words]
        code = cli.main()
        if code:
            raise SystemExit(code)

    return run


def starts_of(config: Config, folder: Path) -> dict[str, Callable[[], object]]:
    """Return the ways to start a run with settings."""
    save_config(config, folder / "own.yaml")
    words = ("--config", str(folder / "own.yaml"))
    return {
        "python": lambda: train(config),
        "train": command("train", *words),
        "check": command("check", "--seconds", "0", *words),
    }


@pytest.mark.parametrize("way", ["python", "train", "check"])
@pytest.mark.parametrize("kind", ["complete", "goes on"])
def test_a_start_reads_the_settings_once_and_looks_for_each_source_once(
    kind: str, way: str, finished: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    """The newest `state.json` is read before torch is, for the model; to go on from it, it is hashed and read once."""
    folder, step = Path(finished.output_dir).parent, last_step(finished)
    num_steps = step if kind == "complete" else step + 1
    config = replace(finished, train=replace(finished.train, steps=num_steps))
    assert decide(config).kind == kind
    capfd.readouterr()
    counts = run_observed(starts_of(config, folder)[way], folder)
    trains = kind == "goes on" and way != "check"
    assert (counts["config"], counts["shards"], counts[f"step-{step:08d}"]) == (1, 1, 3 if trains else 1)
    told = [line for line in capfd.readouterr().err.splitlines() if "the run in" in line or "going on from" in line]
    expected = ["goes on with changed settings: train.steps", "going on from"] if trains else []
    expected = [f"is complete at step {step}"] if kind == "complete" and way == "train" else expected
    assert len(told) == len(expected) and all(words in line for words, line in zip(expected, told, strict=True))


def last_step(config: Config) -> int:
    return int(last_checkpoint(config).name.removeprefix("step-"))


def test_a_run_whose_export_was_being_replaced_is_complete(finished: Config) -> None:
    """Killed between two moves, the export stands under another name until the next start puts it back."""
    train_section = replace(finished.train, steps=last_step(finished))
    config, export = replace(finished, train=train_section), Path(finished.output_dir) / "export"
    away = export.rename(beside(export, REPLACED))
    assert decide(config).kind == "complete"
    elsewhere = away.rename(export.with_name("elsewhere"))
    assert decide(config).kind == "goes on"
    elsewhere.rename(beside(export, REPLACED))
    assert (train(config).export, decide(config).kind) == (export, "complete") and export.is_dir()
