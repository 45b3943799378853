"""Rates that the settings leave open: by what a run begins with, written down, and those of the run that goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from accel_clip.command_line import load_config, save_config
from accel_clip.config import Config, ModelConfig, OptimConfig
from accel_clip.optim.schedules import build_schedule
from accel_clip.run.folder import RunFolder
from accel_clip.run.health import rate_warning
from accel_clip.run.rates import describe_lengthening, describe_rates, with_rates
from accel_clip.run.resume import decide

SCRATCH, WEIGHTS = (5e-4, 0.2), (1e-5, 0.1)
PRETRAINED = ModelConfig("ViT-B-32", "laion2b_s34b_b79k")
RECIPES = Path(__file__).parents[2] / "recipes"


def rates(config: Config) -> tuple[float | None, float | None]:
    return config.optim.lr, config.optim.weight_decay


@pytest.mark.parametrize(
    ("model", "usual"),
    [
        (ModelConfig(), SCRATCH),
        (PRETRAINED, WEIGHTS),
        (ModelConfig("local-dir:runs/old/export"), WEIGHTS),
        (ModelConfig(options={"pretrained_image_path": "tower.pt"}), WEIGHTS),
        (ModelConfig(options={"pretrained_image_path": "tower.pt"}, freeze=["image"]), SCRATCH),
    ],
)
def test_weights_that_are_trained_further_get_a_gentle_rate(model: ModelConfig, usual: tuple[float, float]) -> None:
    given = Config(model=model)
    settled = with_rates(given, None)
    assert rates(settled) == usual
    assert with_rates(settled, None) == settled
    line = describe_rates(given, settled)
    assert line is None if usual == SCRATCH else line is not None and "optim.lr 1e-05, optim.weight_decay 0.1" in line


def test_a_value_that_is_given_wins_and_only_the_other_one_is_told() -> None:
    given = Config(model=PRETRAINED, optim=OptimConfig(lr=3e-4))
    settled = with_rates(given, None)
    assert rates(settled) == (3e-4, 0.1)
    line = describe_rates(given, settled)
    assert line is not None and line.startswith("optim.weight_decay 0.1:")
    assert describe_rates(settled, settled) is None


def test_a_run_goes_on_with_the_rates_that_it_has_written_down(tmp_path: Path) -> None:
    given = Config(output_dir=str(tmp_path / "run"), model=PRETRAINED)
    earlier = replace(given, optim=OptimConfig(lr=SCRATCH[0], weight_decay=SCRATCH[1]))  # as an earlier version chose
    folder = RunFolder(given.output_dir)
    folder.create()
    save_config(earlier, folder.config)
    decision = decide(given)
    assert decision.kind == "goes on" and not decision.changes and rates(decision.config) == SCRATCH
    other = decide(replace(given, optim=OptimConfig(lr=1e-5)))
    assert other.kind == "refused" and "optim.lr" in str(other.refusal)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("finetune*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_for_weights_is_whole_and_no_rate_in_it_is_too_high(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.model.trains_weights and rate_warning(config) is None
    assert None not in rates(config)


def lengthened(length: int | None, former_steps: int, num_steps: int, step: int) -> str | None:
    config = Config(optim=OptimConfig(lr=1.0, warmup=2, length=length))
    return describe_lengthening(config, build_schedule(config.optim, num_steps), former_steps, step)


def test_a_rate_that_jumps_where_a_run_is_lengthened_is_told_with_the_way_to_keep_it() -> None:
    line = lengthened(None, 12, 22, 12)
    assert line is not None and "goes on at 0.5, where it was 0.0245" in line and "--optim.length 12" in line
    kept = lengthened(12, 12, 22, 12)
    assert kept is not None and "goes on at 0.0245, by the curve of 12 steps that it had" in kept
    assert lengthened(None, 12, 12, 6) is None


def test_the_curve_of_a_schedule_ends_where_its_length_says() -> None:
    config = OptimConfig(warmup=2, length=12)
    whole, longer = build_schedule(replace(config, length=None), 12), build_schedule(config, 30)
    assert [longer.multiplier(step) for step in range(12)] == [whole.multiplier(step) for step in range(12)]
    assert {longer.multiplier(step) for step in range(11, 30)} == {whole.multiplier(11)}
    shorter = build_schedule(replace(config, length=100), 30)
    assert shorter.multiplier(29) > 0.7
