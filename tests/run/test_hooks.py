"""Hooks of the user's own: what they see, that nothing in a run changes for them, and what is kept for them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from accel_clip import Config, cli, train
from accel_clip.command_line import save_config
from accel_clip.config import CheckpointConfig, DataConfig, EvalConfig, LossConfig, TrainConfig
from accel_clip.faults import ConfigError, PluginError
from accel_clip.run.hooks import HOOKS
from helpers.commands import CPU_2, accel_clip, launch, train_py
from helpers.models import model_that_drops_patches
from helpers.plugin_files import example, small_table
from helpers.runs import points_of, run_to_the_end, run_until, short_config

NUM_STEPS = 8
MINE = '''
import json
import random

import numpy
import torch
from accel_clip import HOOKS, LOSSES


@LOSSES.register("no number once")
class NoNumberOnce:
    """The contrastive loss, without a number at its call with a number; the first call is a trial."""

    def __init__(self, at=0):
        self.at, self.number = at, -1

    def __call__(self, image_features, text_features, logit_scale, output_dict=True):
        self.number += image_features.requires_grad
        logits = logit_scale * image_features @ text_features.T
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))
        return {"one_loss": loss * float("nan") if self.number == self.at else loss}


@HOOKS.register("mine")
class Mine:
    """All that it sees."""

    def __init__(self, file="seen.json", before="", code="", state="self.seen"):
        self.file, self.code, self.state, self.seen = file, code, state, []
        exec(before)

    def take(self, moment, run):
        draws = [random.random(), numpy.random.rand(), torch.rand(1).item()]
        own = torch.rand(1, generator=run.generator).item()
        self.seen.append([moment, run.step, run.epoch, dict(run.terms), dict(run.metrics), draws, own])
        run.model.clip.train(not run.model.clip.training)
        run.config.model.freeze.append("image")
        exec(self.code)

    def after_step(self, run):
        self.take("step", run)

    def after_evaluation(self, run):
        self.take("evaluation", run)
        if run.is_first_process:
            with open(self.file, "w") as file:
                json.dump(self.seen, file)

    def state_dict(self):
        return eval(self.state)

    def load_state_dict(self, state):
        self.seen = state
'''


@pytest.fixture
def table(tmp_path: Path, own_plugins: None) -> Path:
    return small_table(tmp_path)


def config_for(table: Path, output: str, hooks: list[Any], **sections: Any) -> Config:
    """Return settings of a run that drops patches and is evaluated and saved on its way."""
    (table.parent / "mine.py").write_text(MINE)
    usual: dict[str, Any] = {
        "data": DataConfig(train=[str(table)], val_fraction=0.25, workers=0),
        "eval": EvalConfig(every=4, batch_size=8),
        "checkpoint": CheckpointConfig(every=3),
        "plugins": [str(table.parent / "mine.py")],
        "hooks": hooks,
    }
    output = str(table.parent / output)
    return short_config(output, "", model_that_drops_patches(table.parent), NUM_STEPS, **{**usual, **sections})


def mine(table: Path, file: str, **options: Any) -> list[Any]:
    return [{"mine": {"file": str(table.parent / file), **options}}]


def weights_of(config: Config) -> bytes:
    return (Path(config.output_dir) / "export" / "open_clip_model.safetensors").read_bytes()


def seen_in(table: Path, file: str) -> list[Any]:
    seen: list[Any] = json.loads((table.parent / file).read_text())
    return seen


def test_a_hook_sees_every_step_and_evaluation_and_the_run_is_as_without_it(table: Path) -> None:
    plain = config_for(table, "plain", [])
    config, again = (config_for(table, name, mine(table, f"{name}.json")) for name in ("one", "two"))
    for each in (plain, config, again):
        run_to_the_end(each)
    assert weights_of(config) == weights_of(again) == weights_of(plain)
    seen = seen_in(table, "one.json")
    assert without_times(seen) == without_times(
        seen_in(table, "two.json")
    )  # what it draws is the same whenever a run comes to the step
    moments = [(moment, step) for moment, step, *_ in seen]
    steps: list[Any] = [("step", step) for step in range(1, NUM_STEPS + 1)]
    assert moments == [("evaluation", 0), *steps[:4], ("evaluation", 4), *steps[4:], ("evaluation", 8)]
    points = {point["step"]: point for point in points_of(config) if "lr" in point}
    for moment, step, epoch, terms, metrics, *_ in seen:
        if moment == "step":
            assert terms.keys() == {"loss", "loss/contrastive_loss", "grad_norm", "lr", "data_time"}
            shared = terms.keys() - {"data_time"}
            assert {key: terms[key] for key in shared} == {key: points[step][key] for key in shared}
            assert epoch == points[step]["epoch"]
        else:
            assert not terms
        assert "val/loss" in metrics
    draws = {str(each[-2:]) for each in seen}
    assert len(draws) == len(seen)


def test_every_entry_is_listed_and_runs_as_the_documents_say(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the package and that of CONTRIBUTING.md, whose file holds the largest losses of the run."""
    plugin = str(example("my_hook.py", table.parent))
    config = config_for(table, "run", [{"record": {"most": 3}}], plugins=[plugin])
    train(config)
    assert HOOKS.names() == ["record"] and all(entry.description for entry in HOOKS)
    losses = sorted(((point["loss"], point["step"]) for point in points_of(config) if "lr" in point), reverse=True)
    lines = [f"step {step}: loss {loss:.4f}" for loss, step in losses[:3]]
    assert (table.parent / "run" / "worst.txt").read_text().splitlines() == lines
    capsys.readouterr()
    cli.list_command(["hooks", "--plugins", plugin])
    assert "record  The steps with the largest losses" in capsys.readouterr().out


@pytest.mark.parametrize(
    "faults",
    [
        ["step:5"],
        pytest.param(["step:3", "rename:6"], marks=pytest.mark.slow),
        pytest.param(["latest:6"], marks=pytest.mark.slow),
        pytest.param(["step:1", "step:8"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_what_a_hook_keeps_comes_back_with_a_run_that_was_killed(table: Path, faults: list[str]) -> None:
    whole, killed = (config_for(table, name, mine(table, f"{name}.json")) for name in ("whole", "killed"))
    run_to_the_end(whole)
    for fault in faults:
        run_until(killed, fault)
    run_to_the_end(killed)
    assert weights_of(killed) == weights_of(whole)
    assert without_times(seen_in(table, "killed.json")) == without_times(seen_in(table, "whole.json"))


def without_times(seen: list[Any]) -> list[Any]:
    return [[*each[:3], {**each[3], "data_time": 0}, *each[4:]] for each in seen]


def test_what_a_hook_keeps_goes_back_with_a_run_that_rolls_back(table: Path) -> None:
    """The fifth batch has no loss, and the checkpoint of step 3 is the last."""
    policy = TrainConfig(batch_size=8, steps=NUM_STEPS, threads=1, non_finite="rollback")
    loss = LossConfig("no number once", {"at": 5})
    train(config_for(table, "run", mine(table, "seen.json"), train=policy, loss=loss, eval=EvalConfig(every=8)))
    steps = [step for moment, step, *_ in seen_in(table, "seen.json") if moment == "step"]
    assert steps == list(range(1, NUM_STEPS + 1))


def test_a_step_that_is_left_out_has_no_terms(table: Path) -> None:
    policy = TrainConfig(batch_size=8, steps=NUM_STEPS, threads=1, non_finite="skip")
    loss = LossConfig("no number once", {"at": 5})
    train(config_for(table, "run", mine(table, "seen.json"), train=policy, loss=loss))
    assert [step for moment, step, _, terms, *_ in seen_in(table, "seen.json") if moment == "step" and not terms] == [5]


def test_hooks_may_change_when_a_run_goes_on(table: Path) -> None:
    """One that the checkpoint does not know begins as it is built; one that is gone is not missed."""
    run_until(config_for(table, "run", []), "latest:3")  # the checkpoint is whole
    config = config_for(table, "run", mine(table, "seen.json"))
    run_until(config, "latest:6")
    run_to_the_end(config)
    steps = [step for moment, step, *_ in seen_in(table, "seen.json") if moment == "step"]
    assert steps == [4, 5, 6, 7, 8]  # the checkpoint of step 3 knows nothing of it, that of step 6 does
    plain = config_for(table, "plain", [])
    run_to_the_end(plain)
    assert weights_of(config) == weights_of(plain)


def test_a_run_with_a_hook_hears_a_stop_and_goes_on(table: Path) -> None:
    code = "run.step == 5 and len(self.seen) == 7 and __import__('signal').raise_signal(15)"
    whole = config_for(table, "whole", mine(table, "whole.json"))
    stopped = config_for(table, "stopped", mine(table, "stopped.json", code=code))
    run_to_the_end(whole)
    save_config(stopped, table.parent / "stopped.yaml")
    first = train_py("--config", "stopped.yaml", folder=table.parent)
    assert first.code == 75, first.err
    assert json.loads((table.parent / "stopped" / "STATUS.json").read_text())["step"] in (5, 6)
    assert train_py("--config", "stopped.yaml", folder=table.parent).code == 0
    assert weights_of(stopped) == weights_of(whole)
    assert without_times(seen_in(table, "stopped.json")) == without_times(seen_in(table, "whole.json"))


BUILT: dict[str, tuple[list[Any], str]] = {
    "unknown": (["mein"], "hooks: unknown hook 'mein', did you mean 'mine'"),
    "option": ([{"mine": {"fil": "a"}}], "hooks: the hook 'mine' has no option 'fil'.*did you mean 'file'"),
    "form": ([{"mine": 3}], r"hooks: mine: 3 does not work: write \{mine: \{option: value\}\}"),
    "raises": ([{"mine": {"before": "1 / 0"}}], "hooks: 'mine': .*mine.py: line .*ZeroDivisionError"),
    "twice": (["mine", {"mine": {"file": "b"}}], "hooks: 'mine' stands twice"),
    "state": ([{"mine": {"state": "{1: 2}"}}], "hooks: 'mine' state_dict: it would come back.* another one"),
    "no json": ([{"mine": {"state": "{1, 2}"}}], "hooks: 'mine' state_dict: it cannot be kept"),
    "no number": ([{"mine": {"state": "float('inf')"}}], "hooks: 'mine' state_dict: it cannot be kept"),
}


@pytest.mark.parametrize("case", BUILT)
def test_what_cannot_be_a_hook_is_told_in_one_line_before_anything_is_written(case: str, table: Path) -> None:
    hooks, message = BUILT[case]
    config = config_for(table, "run", hooks)
    with pytest.raises((ConfigError, PluginError), match=message) as refused:
        train(config)
    assert "\n" not in str(refused.value)
    assert not Path(config.output_dir).exists()


class AfterEpoch:
    """A moment that there is not."""

    def after_step(self, run: object) -> None: ...
    def after_epoch(self, run: object) -> None: ...


class Never:
    """No moment at all."""

    def step(self, run: object) -> None: ...


class HalfAState:
    """A state that nobody puts back."""

    def after_step(self, run: object) -> None: ...
    def state_dict(self) -> dict[str, int]:
        return {}


def one_without_moments() -> object:
    """Return what only shows its form once it is built."""
    return Never()


SHAPES: list[tuple[Callable[..., Any], str]] = [
    (AfterEpoch, "'odd' has after_epoch, which is never called.* known: after_step, after_evaluation"),
    (Never, "'odd' has neither after_step nor after_evaluation"),
    (HalfAState, "'odd' has one of state_dict and load_state_dict: a state needs both"),
    (one_without_moments, "'odd' has neither after_step nor after_evaluation"),
]


@pytest.mark.parametrize(("shape", "message"), SHAPES)
def test_a_class_of_another_form_is_refused(shape: Callable[..., Any], message: str, table: Path) -> None:
    HOOKS.register("odd", description="It is odd.")(shape)
    config = config_for(table, "run", ["odd"])
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not Path(config.output_dir).exists()


def with_members(**members: Any) -> type:
    """Return the class of a hook that has these members beside the method of a moment."""
    return type("Made", (), {"after_step": lambda self, run: None, **members})


def fails(*given: Any) -> Any:
    raise ZeroDivisionError("no step yet")


def test_properties_without_a_value_and_methods_that_are_switched_off_are_no_mistakes(table: Path) -> None:
    made = with_members(mean=property(fails), on_average=property(fails), after_evaluation=None)
    HOOKS.register("odd", description="It is odd.")(made)
    train(config_for(table, "run", ["odd"]))


def test_what_describes_the_model_is_a_copy(table: Path) -> None:
    """A hook that empties it changes no evaluation, no checkpoint and no export."""
    described = "(run.model.model_config, run.model.preprocess_config, run.model.towers)"
    config = config_for(table, "run", mine(table, "seen.json", code=f"[each.clear() for each in {described}]"))
    plain = config_for(table, "plain", [])
    for each in (config, plain):
        train(each)
    for file in ("export/open_clip_config.json", "export/open_clip_model.safetensors"):
        assert (Path(config.output_dir) / file).read_bytes() == (Path(plain.output_dir) / file).read_bytes()
    last = f"checkpoints/step-{NUM_STEPS:08d}/state.json"
    states = [json.loads((Path(each.output_dir) / last).read_text()) for each in (config, plain)]
    assert states[0]["model"] == states[1]["model"] and states[0]["run"] == states[1]["run"]


CALLED = {
    "raises": ("[][run.step]", "'mine' after_evaluation at step 0: .*mine.py: line .*IndexError"),
    "writes": ("run.model.clip.logit_scale.add_(1)", "'mine' after_evaluation at step 0: it has changed logit_scale"),
    "later": ("run.step == 2 and [][0]", "'mine' after_step at step 2: .*IndexError"),
    "terms": ("run.terms.update(loss=0)", "'mine' after_evaluation at step 0: .*AttributeError"),
}


@pytest.mark.parametrize("case", CALLED)
def test_what_goes_wrong_in_a_hook_names_it_the_moment_and_the_step(case: str, table: Path) -> None:
    code, message = CALLED[case]
    config = config_for(table, "run", mine(table, "seen.json", code=code))
    with pytest.raises((ConfigError, PluginError), match=f"hooks: {message}"):
        train(config)
    status = json.loads((Path(config.output_dir) / "STATUS.json").read_text())
    assert status["state"] == "failed" and "hooks: 'mine'" in status["error"]


CHECKED: dict[str, tuple[list[Any], str]] = {name: BUILT[name] for name in ("option", "raises", "twice", "state")}


@pytest.mark.parametrize(
    "case", [each if each in ("option", "twice") else pytest.param(each, marks=pytest.mark.slow) for each in CHECKED]
)
def test_a_check_refuses_what_a_run_would(case: str, table: Path) -> None:
    hooks, message = CHECKED[case]
    save_config(config_for(table, "run", hooks), table.parent / "settings.yaml")
    checked = accel_clip("check", "--config", "settings.yaml", "--seconds", "0", folder=table.parent)
    assert checked.code == 2 and re.search(message, checked.out + checked.err), checked.out + checked.err


@pytest.mark.slow
def test_every_process_calls_a_hook_and_the_first_keeps_its_state(table: Path) -> None:
    """Each process counts its calls in a file of its own, and goes on from the first one's count."""
    code = "open(f'{self.file}.{__import__(\"os\").environ.get(\"RANK\")}', 'w').write(str(len(self.seen)))"
    config = config_for(table, "run", mine(table, "seen.json", code=code))
    save_config(replace(config, train=replace(config.train, steps=6)), table.parent / "settings.yaml")
    done = launch("--config", "settings.yaml", folder=table.parent, launcher=CPU_2)
    assert done.code == 0, done.err
    counts = [(table.parent / f"seen.json.{rank}").read_text() for rank in (0, 1)]
    assert counts == ["9", "9"]  # six steps, evaluations at 0, 4 and 6
    state = json.loads((table.parent / "run" / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert len(state["hooks"]["mine"]) == 9


RANKS = """
import json, os
from accel_clip import HOOKS

RANK = os.environ["RANK"]


@HOOKS.register("ranks")
class Ranks:
    def __init__(self):
        self.ranks = [RANK]

    def after_step(self, run):
        with open(f"seen-{RANK}.jsonl", "a") as file:
            file.write(json.dumps([run.step, run.terms["loss"], run.is_first_process, self.ranks]) + "\\n")

    def state_dict(self):
        return {"ranks": self.ranks}

    def load_state_dict(self, state):
        self.ranks = [*state["ranks"], "then", RANK]
"""


@pytest.mark.slow
def test_every_process_goes_on_with_the_state_of_the_first(table: Path) -> None:
    (table.parent / "ranks.py").write_text(RANKS)
    config = config_for(table, "run", ["ranks"], plugins=[str(table.parent / "ranks.py")])
    for steps in (2, 3):
        save_config(replace(config, train=replace(config.train, steps=steps)), table.parent / "settings.yaml")
        done = launch("--config", "settings.yaml", folder=table.parent, launcher=CPU_2)
        assert done.code == 0, done.err
    first, second = (
        [json.loads(line) for line in (table.parent / f"seen-{rank}.jsonl").read_text().splitlines()] for rank in "01"
    )
    assert [each[:2] for each in first] == [each[:2] for each in second] and [each[0] for each in first] == [1, 2, 3]
    assert [each[2:] for each in first] == [[True, ["0"]]] * 2 + [[True, ["0", "then", "0"]]]
    assert [each[2:] for each in second] == [[False, ["1"]]] * 2 + [[False, ["0", "then", "1"]]]
