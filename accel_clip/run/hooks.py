"""Hooks: a user's own classes that look at a run after every step or evaluation, and change nothing of it.

1. A hook is called in every process, in the order of the settings, with a view of the run.
2. Global random numbers are seeded for it by the run's seed, its name, the moment and the step, and restored after it.
3. Modes of the model are restored; a weight that was written to is an error.
4. What it keeps goes into every checkpoint, from the first process, and comes back when the run goes on.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator

from accel_clip.checkpoint.run_state import RunState
from accel_clip.config import Config
from accel_clip.faults import ConfigError, nearest, one_line
from accel_clip.models.build import ClipModel
from accel_clip.models.reading import only_read, with_own_descriptions
from accel_clip.plugins import own_code
from accel_clip.randomness import derive_seed, guarded
from accel_clip.registry import Registry, check_options, name_of, options_of

SETTING = "hooks"
HOOKS = Registry("hook", setting=SETTING)
AFTER_STEP, AFTER_EVALUATION = MOMENTS = ("after_step", "after_evaluation")
STATE_METHODS = ("state_dict", "load_state_dict")
LIKE_A_MOMENT = re.compile(r"(after|before|on)_")
PLAIN = "keep texts, numbers that are finite, true, false, null, lists, and dictionaries with texts as keys"


@dataclass(frozen=True)
class RunView:
    """A run as a hook sees it after a step or an evaluation, for reading alone."""

    step: int
    """optimizer steps taken"""
    epoch: float
    """passes over the training data"""
    terms: Mapping[str, float]
    """what this step measured, means over all processes: loss, loss/…, grad_norm, lr; empty after an evaluation, and
    after a step that was left out because it was not finite"""
    metrics: Mapping[str, float]
    """what the last evaluation measured"""
    config: Config
    """a copy of the settings"""
    model: ClipModel
    """the model that is trained: its clip, tokenizer and preprocessing"""
    generator: torch.Generator
    """random numbers on the CPU, the same whenever a run comes to this step, in every process"""
    is_first_process: bool
    """whether this is the process that writes files"""


class Hooks:
    """The hooks of a run, each built once with its options.

    Raises `ConfigError` for a hook that is unknown, cannot be built or is none; `PluginError` for what one raises.
    """

    def __init__(self, config: Config, model: ClipModel, accelerator: Accelerator) -> None:
        self.seed, self.model, self.accelerator = config.seed, model, accelerator
        # what a hook does to these, it does to no run
        self.shown_config, self.shown_model = deepcopy(config), with_own_descriptions(model)
        require_once([name_of(item, SETTING) for item in config.hooks])
        self.hooks = {name_of(item, SETTING): build_hook(item) for item in config.hooks}
        self.at_start = self.states()

    def after_step(self, state: RunState, epoch: float, terms: Mapping[str, float]) -> None:
        """Call the hooks after an optimizer step; terms: what was measured in it, by name."""
        self.call(AFTER_STEP, state, epoch, {} if state.num_non_finite else terms)

    def after_evaluation(self, state: RunState, epoch: float) -> None:
        """Call the hooks after an evaluation, whose metrics stand in the run's state."""
        self.call(AFTER_EVALUATION, state, epoch, {})

    def call(self, moment: str, state: RunState, epoch: float, terms: Mapping[str, float]) -> None:
        """Call every hook that has a method for a moment."""
        for name, hook in self.hooks.items():
            if moment not in methods_of(hook):
                continue
            title = f"{SETTING}: '{name}' {moment} at step {state.step}"
            seed = derive_seed(self.seed, "hook", name, moment, state.step)
            view = self.view(state, epoch, terms, torch.Generator().manual_seed(seed))
            reading, drawing = only_read(self.model.clip, title), guarded(seed, self.accelerator.device)
            with reading, drawing, own_code(title, hook), torch.no_grad():
                getattr(hook, moment)(view)

    def view(self, state: RunState, epoch: float, terms: Mapping[str, float], generator: torch.Generator) -> RunView:
        """Return what one hook sees."""
        return RunView(
            step=state.step,
            epoch=epoch,
            terms=MappingProxyType(dict(terms)),
            metrics=MappingProxyType(dict(state.metrics)),
            config=self.shown_config,
            model=self.shown_model,
            generator=generator,
            is_first_process=self.accelerator.is_main_process,
        )

    def states(self) -> dict[str, Any]:
        """Return what each hook keeps that keeps something, as plain JSON, by its name."""
        return {name: kept_by(name, hook) for name, hook in self.hooks.items() if "state_dict" in methods_of(hook)}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the hooks; nothing in a run without any."""
        states = self.states()
        return {SETTING: states} if states else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; a hook of which it holds nothing begins as it was built."""
        saved = state.get(SETTING, {})
        for name, at_start in self.at_start.items():
            title, hook = f"{SETTING}: '{name}' load_state_dict", self.hooks[name]
            with own_code(title, hook):
                hook.load_state_dict(deepcopy(saved.get(name, at_start)))


def kept_by(name: str, hook: Any) -> Any:
    """Return what a hook keeps, as JSON gives it back; raises `ConfigError` for what JSON does not keep."""
    title = f"{SETTING}: '{name}' state_dict"
    with own_code(title, hook):
        state = hook.state_dict()
    try:
        text = json.dumps(state, allow_nan=False, ensure_ascii=False)
        text.encode()
        kept = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{title}: it cannot be kept in a checkpoint: {one_line(error)}: {PLAIN}") from error
    if kept != state:
        raise ConfigError(f"{title}: it would come back from a checkpoint as another one: {PLAIN}")
    return kept


def check_hook(item: str | Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an item of `hooks` with an unknown name, wrong or missing options, or no hook behind."""
    name = name_of(item, SETTING)
    target = HOOKS.get(name)
    check_options(SETTING, f"the hook '{name}'", target, options_of(item, SETTING), given=())
    if inspect.isclass(target):
        require_hook(name, target)


def build_hook(item: str | Mapping[str, Any]) -> Any:
    """Return the hook that an item of `hooks` names; raises `ConfigError` as `check_hook` does."""
    check_hook(item)
    name, target = name_of(item, SETTING), HOOKS.get(name_of(item, SETTING))
    with own_code(f"{SETTING}: '{name}'", target):
        hook = target(**options_of(item, SETTING))
    require_hook(name, hook)
    return hook


def require_hook(name: str, hook: object) -> None:
    """Raise `ConfigError` for what has no method for a moment, one for another moment, or half a state."""
    methods = methods_of(hook)
    for method in methods:
        if method not in (*MOMENTS, *STATE_METHODS):
            hint = nearest(method, MOMENTS) or ";"
            raise ConfigError(
                f"{SETTING}: '{name}' has {method}, which is never called{hint} known: {', '.join(MOMENTS)}"
            )
    if not set(MOMENTS) & set(methods):
        raise ConfigError(f"{SETTING}: '{name}' has neither {' nor '.join(MOMENTS)}: it would never be called")
    if len(set(STATE_METHODS) & set(methods)) == 1:
        raise ConfigError(f"{SETTING}: '{name}' has one of {' and '.join(STATE_METHODS)}: a state needs both")


def methods_of(hook: object) -> list[str]:
    """Return the methods of a hook that are called, or look as if they were; its properties may have no value yet."""
    asked = [name for name in dir(hook) if name in STATE_METHODS or LIKE_A_MOMENT.match(name)]
    methods = [name for name in asked if not isinstance(inspect.getattr_static(hook, name), property)]
    return [name for name in methods if callable(getattr(hook, name))]


def require_once(names: Collection[str]) -> None:
    """Raise `ConfigError` for a hook that is named twice: a checkpoint keeps one state a name."""
    twice = [name for name in names if list(names).count(name) > 1]
    if twice:
        raise ConfigError(f"{SETTING}: '{twice[0]}' stands twice: name it once")
