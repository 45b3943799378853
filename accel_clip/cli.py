"""The commands, their exit codes, and the one line they say when they cannot go on."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from accel_clip import console
from accel_clip.faults import INTERRUPTED_EXIT_CODE, AccelClipError, ConfigError, nearest

TRAIN_HELP = (
    "Train a CLIP model on your own pictures and captions. Settings come from defaults, --config files and flags."
)
EVAL_HELP = "Evaluate a model on --data.val and --eval.zero_shot. --json prints one JSON object."
KINDS = ("losses", "optimizers", "schedules", "sources", "models", "trackers")


def main() -> int:
    """Run `accel-clip COMMAND …` and return its exit code."""
    return guarded(lambda: dispatch(sys.argv[1:]))


def train_main() -> int:
    """Run `train.py …` and return its exit code."""
    return guarded(lambda: train_command(sys.argv[1:], "train.py"))


def guarded(command: Callable[[], None]) -> int:
    """Run a command and turn its errors into one line and an exit code; what is our own bug keeps its traceback."""
    signal.signal(signal.SIGTERM, interrupt)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait starve the loader's workers
    try:
        command()
    except AccelClipError as error:
        console.error(str(error), from_every_process=not error.on_every_process)
        return error.exit_code
    except KeyboardInterrupt:
        console.say("interrupted")
        return INTERRUPTED_EXIT_CODE
    return 0


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """End the command as Ctrl-C does; further signals are ignored while it cleans up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def dispatch(arguments: list[str]) -> None:
    """Run the command that the first word names."""
    commands = {
        "train": lambda rest: train_command(rest, "accel-clip train"),
        "eval": eval_command,
        "export": export_command,
        "list": list_command,
        "plot": plot_command,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        console.result(USAGE)
    elif arguments[0] in commands:
        commands[arguments[0]](arguments[1:])
    else:
        word = arguments[0]
        raise ConfigError(f"unknown command '{word}'{nearest(word, commands)} Commands: {', '.join(commands)}")


USAGE = """usage: accel-clip COMMAND …

  train   train a model; the same as accelerate launch train.py, in one process
  eval    evaluate a model on held-out pairs and labelled pictures
  export  write a run's model as a folder that open_clip loads
  list    list losses, optimizers, schedules, sources, models or trackers
  plot    draw a run's curves and retrieval examples as pictures

accel-clip COMMAND --help says more."""


def train_command(arguments: list[str], program: str) -> None:
    """Train."""
    from accel_clip.command_line import parse_config

    config = parse_config(arguments, program, TRAIN_HELP)
    from accel_clip.check import check_files

    check_files(config)
    from accel_clip.trainer import train  # imports torch, so it comes after everything that can fail without

    result = train(config)
    console.say(f"model   {result.export}  (open_clip loads it as 'local-dir:{result.export}')")
    console.say(f"curves  tensorboard --logdir {config.output_dir}")
    console.say(f"next    accel-clip eval --model.name local-dir:{result.export} --data.val YOUR.csv")


def eval_command(arguments: list[str]) -> None:
    """Evaluate a model."""
    from accel_clip.command_line import parse_config

    as_json = "--json" in arguments
    config = parse_config([word for word in arguments if word != "--json"], "accel-clip eval", EVAL_HELP)
    if config.data.val is None and config.eval.zero_shot is None:
        raise ConfigError("data.val: name the held-out pairs to evaluate on, or labelled pictures as eval.zero_shot")
    from accel_clip.evaluation.command import evaluate

    metrics = evaluate(config)
    console.result(json.dumps(metrics) if as_json else "\n".join(f"{key:40} {metrics[key]:.4f}" for key in metrics))


def export_command(arguments: list[str]) -> None:
    """Export a run's model."""
    parser = Parser(prog="accel-clip export", description="Write a run's model as a folder that open_clip loads.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--to", type=Path, help="folder to write; default: RUN/export")
    parser.add_argument("--push", metavar="ORG/NAME", help="also upload it to the Hugging Face hub")
    options = parser.parse_args(arguments)
    from accel_clip.export import export_run, push_to_hub

    folder = export_run(options.run, options.to)
    console.result(f"local-dir:{folder}")
    if options.push:
        console.result(push_to_hub(folder, options.push))


def list_command(arguments: list[str]) -> None:
    """List the entries of a registry."""
    parser = Parser(prog="accel-clip list", description="List the names that settings can take.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--plugins", nargs="*", default=[], help="Python files that register your own")
    options = parser.parse_args(arguments)
    from accel_clip.listing import entries

    rows = entries(options.kind, options.plugins)
    width = max(len(name) for name, _ in rows)
    console.result("\n".join(f"{name:{width}}  {description}".rstrip() for name, description in rows))


def plot_command(arguments: list[str]) -> None:
    """Draw a run's pictures."""
    parser = Parser(prog="accel-clip plot", description="Draw a run's curves and retrieval examples as pictures.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--to", type=Path, help="folder to write; default: RUN/plots")
    options = parser.parse_args(arguments)
    from accel_clip.plots import plot_run

    for picture in plot_run(options.run, options.to or options.run / "plots"):
        console.result(str(picture))


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are those of this program."""

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError` with the message."""
        raise ConfigError(f"{self.prog}: {message} (see {self.prog} --help)")
