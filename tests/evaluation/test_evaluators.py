"""Evaluators of the user's own: what they get, where their numbers stand, and how they are told when they are wrong."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import open_clip
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from accel_clip import Config, cli, evaluate, train
from accel_clip.config import DataConfig, EvalConfig, LossConfig, ModelConfig, StopConfig, TrackConfig, TrainConfig
from accel_clip.data.sources.resolve import open_labelled, open_source
from accel_clip.evaluation.base import EVALUATORS, bind
from accel_clip.evaluation.encoders import Encoders
from accel_clip.evaluation.evaluator import Evaluator
from accel_clip.faults import ConfigError, DataError
from accel_clip.losses.base import build_loss
from accel_clip.models.build import ClipModel, build_model
from accel_clip.plugins import load_plugins
from helpers.comparison import assert_equal_to_rounding, in_float64, rounding
from helpers.models import small_model
from helpers.plugin_files import example, small_table

MAX_PIXELS = 1e6
ANSWERS = '''
import random, numpy, torch
from accel_clip import EVALUATORS


@EVALUATORS.register("mine")
class Mine:
    """One line about it."""

    def __init__(self, said=("mine/one",), answer="{'mine/one': 1}", before=""):
        self.said, self.answer, self.before = said, answer, before
        exec(before)

    def metric_names(self):
        return list(self.said)

    def evaluate(self, encoders):
        return eval(self.answer)
'''


@pytest.fixture
def table(tmp_path: Path, own_plugins: None) -> Path:
    return small_table(tmp_path)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(ANSWERS)
    return tmp_path / "mine.py"


def config_for(table: Path, plugin: Path, **settings: Any) -> Config:
    """Return settings of a run of three steps that is evaluated after each."""
    config = Config(
        output_dir=str(table.parent / "run"),
        plugins=[str(plugin)],
        data=DataConfig(train=[str(table)], val_fraction=0.25, workers=0),
        model=ModelConfig(small_model(table.parent)),
        train=TrainConfig(batch_size=8, steps=3, threads=1),
        eval=EvalConfig(every=1, batch_size=8),
        track=TrackConfig(to=[], every=1),
    )
    return replace(config, **settings)


def points_of(config: Config, *without: str) -> list[dict[str, Any]]:
    """Return the points of evaluations."""
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    return [{key: each[key] for key in each if key not in without} for each in points if "val/loss" in each]


def evaluator_for(table: Path, also: list[Any], zero_shot: bool = False) -> tuple[Evaluator, ClipModel]:
    torch.manual_seed(0)
    model = build_model(ModelConfig(small_model(table.parent)))
    data, loss = DataConfig(train=[str(table)]), build_loss(LossConfig())
    labelled = open_labelled(str(table), data, "label") if zero_shot else None
    source, config = open_source(str(table), data), EvalConfig(batch_size=8, also=also)
    accelerator = Accelerator(cpu=True)
    return Evaluator(accelerator, model, config, source, labelled, loss, MAX_PIXELS, num_workers=0), model


def test_every_entry_measures_what_it_says_and_leaves_everything_alone(table: Path, tmp_path: Path) -> None:
    load_plugins([str(example("my_evaluator.py", tmp_path))])
    evaluator, model = evaluator_for(table, [{"negation": {"prefix": "not "}}], zero_shot=True)
    assert (
        {each.name for each in evaluator.evaluators}
        == set(EVALUATORS.names())
        == {*("negation", "retrieval", "zero_shot")}
    )
    model.clip.train()
    modes = [part.training for part in model.clip.modules()]
    weights = {name: value.clone() for name, value in model.clip.state_dict().items()}
    states = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()
    metrics = evaluator.run()
    assert states == (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist())
    assert modes == [part.training for part in model.clip.modules()]
    assert all(torch.equal(value, weights[name]) for name, value in model.clip.state_dict().items())
    assert all(type(value) is float for value in metrics.values())
    assert set(metrics) == evaluator.metric_names() and len(metrics) == 14
    assert 0 <= metrics["negation/accuracy"] <= 1
    for entry in EVALUATORS:
        assert entry.description, entry.name


def test_zero_shot_says_no_more_than_it_measures(table: Path, tmp_path: Path) -> None:
    few = table.with_name("few.csv")
    few.write_text("\n".join(table.read_text().splitlines()[:4]))  # three classes
    evaluator, _ = evaluator_for(few, [], zero_shot=True)
    assert set(evaluator.run()) == evaluator.metric_names() and "zero_shot/top5" not in evaluator.metric_names()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_encoders_give_the_models_features_of_any_pictures_and_captions(table: Path, num_workers: int) -> None:
    evaluator, model = evaluator_for(table, [])
    encoders = Encoders(evaluator.accelerator, model, 4, MAX_PIXELS, num_workers)
    files = [table.with_name(f"{number}.png") for number in range(7)]
    as_png = BytesIO()
    Image.open(files[5]).save(as_png, "png")
    given = [*files[:4], str(files[4]), as_png.getvalue(), Image.open(files[6]).convert("RGB")]
    captions = [f"number {number}" for number in range(9)]
    found = {"image_features": encoders.pictures(given), "text_features": encoders.captions(captions)}
    transform = open_clip.image_transform(
        32, is_train=False, mean=model.clip.visual.image_mean, std=model.clip.visual.image_std
    )
    pictures = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    model.clip.eval()
    with torch.no_grad():
        expected, exact = (
            each.clip(pictures.to(each.clip.logit_scale.dtype), model.tokenizer(captions))
            for each in (model, in_float64(model))
        )
    assert_equal_to_rounding(found, *({name: each[name] for name in found} for each in (expected, exact)))
    for features in found.values():
        assert features.dtype == torch.float32 and features.device.type == "cpu"
        assert (features.norm(dim=1) - 1).abs().max() <= rounding(features.shape[1])
    assert encoders.pictures([]).shape == (0, 32)


def test_a_run_is_the_same_with_an_evaluator_whose_metric_is_watched(
    table: Path, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It measures 3, 2, 1, 2 and draws from all generators, so the second evaluation from the end is the best."""
    draws = "[random.random(), numpy.random.rand(), torch.rand(1).item()]"
    answer = f"{{'mine/drawn': sum({draws}), 'mine/nothing': float('nan'), 'mine/rank': VALUES.pop(0)}}"
    also: list[Any] = [
        {
            "mine": {
                "said": ["mine/drawn", "mine/nothing", "mine/rank"],
                "answer": answer,
                "before": "global VALUES; VALUES = [3, 2, 1, 2]",
            }
        }
    ]
    plain = config_for(table, mine, output_dir=str(table.parent / "plain"))
    config = config_for(
        table,
        mine,
        eval=replace(plain.eval, also=also),
        stop=StopConfig("mine/rank"),
        track=TrackConfig(to=["tensorboard"], every=1),
    )
    train(plain)
    capsys.readouterr()
    result = train(config)
    assert "step 2: " in (said := capsys.readouterr().err) and "mine/rank 1.0000" in said
    points = points_of(config)
    assert [point["mine/rank"] for point in points] == [3, 2, 1, 2]
    assert [point["mine/nothing"] for point in points] == [None] * 4
    assert len({point["mine/drawn"] for point in points}) == 1  # the same draws in every evaluation
    assert points_of(config, "mine/rank", "mine/nothing", "mine/drawn") == points_of(plain)
    assert result.metrics["mine/rank"] == 1  # the best, not the last
    events = EventAccumulator(str(Path(config.output_dir) / "tensorboard"))
    events.Reload()
    assert [each.value for each in events.Scalars("mine/rank")] == [3, 2, 1, 2]


def test_the_commands_list_and_measure_it(
    table: Path, mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    also: list[Any] = [{"mine": {"answer": "{'mine/one': len(encoders.captions(['a', 'b']))}"}}]
    config = config_for(table, mine, eval=EvalConfig(also=also))
    assert evaluate(replace(config, data=replace(config.data, val=None))) == {"mine/one": 2.0}
    monkeypatch.setattr(sys, "argv", ["accel-clip", "list", "evaluators", "--plugins", str(mine)])
    assert cli.main() == 0
    listed = capsys.readouterr().out
    assert "mine       One line about it." in listed and "retrieval  Retrieval both ways" in listed


BUILT = {
    "unknown": ("mein", "unknown evaluator 'mein', did you mean 'mine'. known: mine, retrieval, zero_shot"),
    "option": ({"mine": {"sayd": []}}, "evaluator 'mine' has no option 'sayd'.*did you mean 'said'"),
    "form": ({"mine": 3}, r"eval.also: mine: 3 does not work: write \{mine: \{option: value\}\}"),
    "built in": ("retrieval", "eval.also: 'retrieval' measures without being named"),
    "raises": ({"mine": {"before": "1 / 0"}}, r"eval.also: 'mine': .*mine.py: line 12: ZeroDivisionError: division"),
    "no group": ({"mine": {"said": ["accuracy"]}}, "eval.also: 'mine': 'accuracy' cannot be the name of a metric"),
    "taken group": ({"mine": {"said": ["val/loss"]}}, "eval.also: 'mine': 'val/loss' cannot be the name"),
    "no word": ({"mine": {"said": [3]}}, "eval.also: 'mine': 3 cannot be the name"),
    "twice": ({"mine": {"said": ["mine/a", "mine/a"]}}, "eval.also: 'mine': mine/a is measured already"),
}


@pytest.mark.parametrize("case", BUILT)
def test_what_cannot_measure_is_told_in_one_line_before_anything_is_written(case: str, table: Path, mine: Path) -> None:
    item, message = BUILT[case]
    config = config_for(table, mine, eval=EvalConfig(also=[item]))
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not Path(config.output_dir).exists()
    if case in ("unknown", "option", "form", "built in"):
        with pytest.raises(ConfigError, match=message):  # before the model is built
            evaluate(replace(config, model=ModelConfig("no such model")))


MEASURED = {
    "raises": ("[][0]", r"eval.also: 'mine': .*mine.py: line 18: IndexError: list index out of range"),
    "not announced": ("{'mine/two': 1}", "'mine': mine/one did not come; mine/two came unannounced"),
    "nothing": ("None", "'mine': evaluate returned NoneType"),
    "no number": ("{'mine/one': '3'}", "'mine': mine/one is str: evaluate must return one number a name"),
    "no float": ("{'mine/one': 10**400}", "'mine': mine/one is int: evaluate must return one number a name"),
    "many numbers": ("{'mine/one': torch.ones(2)}", "'mine': mine/one is Tensor"),
    "writes": ("{'mine/one': encoders.model.clip.logit_scale.add_(1)}", "'mine': it has changed logit_scale"),
}


@pytest.mark.parametrize("case", MEASURED)
def test_what_goes_wrong_while_measuring_names_the_evaluator(case: str, table: Path, mine: Path) -> None:
    answer, message = MEASURED[case]
    load_plugins([str(mine)])
    evaluator, _ = evaluator_for(table, [{"mine": {"answer": answer}}])
    with pytest.raises(ConfigError, match=message):
        evaluator.run()


def test_what_describes_the_model_is_a_copy(table: Path, mine: Path) -> None:
    """An evaluator that empties it changes no later evaluation, and no export."""
    load_plugins([str(mine)])
    model = "encoders.model"
    emptied = f"[each.clear() for each in ({model}.model_config, {model}.preprocess_config, {model}.towers)]"
    evaluator, built = evaluator_for(table, [{"mine": {"answer": f"{{'mine/one': len({emptied})}}"}}])
    before = built.model_config.copy(), built.preprocess_config.copy(), built.towers.copy()
    assert evaluator.run() == evaluator.run()
    assert (built.model_config, built.preprocess_config, built.towers) == before and before[0] and before[1]


def test_numbers_of_any_kind_are_taken(table: Path, mine: Path) -> None:
    load_plugins([str(mine)])
    for answer in ("torch.ones(())", "torch.ones(1)", "numpy.float32(1)", "1"):
        evaluator, _ = evaluator_for(table, [{"mine": {"answer": f"{{'mine/one': {answer}}}"}}])
        value = evaluator.run()["mine/one"]
        assert type(value) is float and value == 1


def test_a_picture_that_cannot_be_used_ends_the_evaluation_with_its_name(table: Path, mine: Path) -> None:
    load_plugins([str(mine)])
    answer = "{'mine/one': encoders.pictures([b'no picture'] * 2).sum()}"
    evaluator, _ = evaluator_for(table, [{"mine": {"answer": answer}}])
    with pytest.raises(DataError, match=r"eval\.also: 'mine': picture 0 of 2 cannot be used: unreadable"):
        evaluator.run()


def test_what_an_evaluator_names_is_passed(table: Path, own_entries: None) -> None:
    @EVALUATORS.register("asks")
    class Asks:
        """It keeps what it gets."""

        def __init__(self, held_out: object, eval_config: object, own: int = 1) -> None:
            self.found = held_out, eval_config, own

    given = {"held_out": "pairs", "zero_shot": None, "loss": None, "eval_config": "settings"}
    assert bind("asks", {"own": 2}, given).evaluator.found == ("pairs", "settings", 2)
