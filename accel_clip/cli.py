"""The commands, their exit codes, and the one line they say when they cannot go on."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from accel_clip import console
from accel_clip.faults import INTERRUPTED_EXIT_CODE, AccelClipError, ConfigError, nearest, recognised
from accel_clip.process.signals import Interruptible, following_launcher, leave_if_waited_for, wait_for_the_first
from accel_clip.process.terminal import lasting_output
from accel_clip.redaction import masked, printable
from accel_clip.typed import Range, shown_value

TRAIN_HELP = (
    "Train a CLIP model on your own pictures and captions. Settings come from defaults, --config files and flags."
)
EVAL_HELP = "Evaluate a model on --data.val and --eval.zero_shot, and by --eval.also. --json prints one JSON object."
CHECK_HELP = (
    "Say what a training run with these settings will be, and everything that is wrong with it, in seconds. Beside the "
    "settings it takes --samples N (pairs to look at, 500), --seconds S (to measure speed for, 10; 0 = not), "
    "--processes N (that will train, 1), --show FOLDER (for a page with pictures and captions as training sees them) "
    "and --json. Ends with exit code 0, 2 (settings) or 3 (data)."
)
CHECK_RANGES = {"samples": Range(1, 10**9), "seconds": Range(0, 86400), "processes": Range(1, 2**16)}
KINDS = ("losses", "optimizers", "schedules", "sources", "evaluators", "hooks", "models", "trackers")


def main() -> int:
    """Run `accel-clip COMMAND …` and return its exit code."""
    return exit_code_after(lambda: dispatch(sys.argv[1:]))


def train_main() -> int:
    """Run `train.py …` and return its exit code."""
    return exit_code_after(lambda: train_command(sys.argv[1:], "train.py"))


def exit_code_after(command: Callable[[], None]) -> int:
    """Run a command and turn its errors into one line and an exit code; what is our own bug keeps its traceback."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait starve the loader's workers
    threads = threading.enumerate()
    with lasting_output():
        try:
            with Interruptible(), following_launcher(), recognised():
                command()
        except AccelClipError as error:
            if error.on_every_process and not console.is_first_process():
                wait_for_the_first()
            console.error(str(error))
            return error.exit_code
        except KeyboardInterrupt:
            console.say("interrupted")
            leave_if_waited_for(INTERRUPTED_EXIT_CODE, threads)
            return INTERRUPTED_EXIT_CODE
        except Exception:  # whatever is our own bug: its traceback may hold an address with a credential
            console.write_line(traceback.format_exc().rstrip())
            return 1
    return 0


def dispatch(arguments: list[str]) -> None:
    """Run the command that the first word names."""
    commands = {
        "train": lambda rest: train_command(rest, "accel-clip train"),
        "check": check_command,
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
  check   say what a training run will be, and everything that is wrong, before the hours start
  eval    evaluate a model on held-out pairs and labelled pictures
  export  write a run's model as a folder that open_clip loads
  list    list losses, optimizers, schedules, sources, evaluators, hooks, models or trackers
  plot    draw a run's curves and retrieval examples as pictures

accel-clip COMMAND --help says more."""


def train_command(arguments: list[str], program: str) -> None:
    """Train."""
    from accel_clip.command_line import parse_config

    config = parse_config(arguments, program, TRAIN_HELP)
    from accel_clip.run.preconditions import prepare

    start = prepare(config)
    if start.decision.kind == "complete":
        from accel_clip.run.folder import RunFolder

        folder = RunFolder(config.output_dir)
        if console.is_first_process():
            folder.tidy()
        step = folder.read_status()["step"]
        console.say(f"the run in {config.output_dir} is complete at step {step}: a longer train.steps goes on with it")
        return
    from accel_clip.commands.train import train_from  # imports torch, so it comes after everything that can end without

    result = train_from(start)
    console.say(f"model   {result.export}  (open_clip loads it as 'local-dir:{result.export}')")
    console.say(f"curves  tensorboard --logdir {config.output_dir}")
    console.say(f"next    accel-clip eval --model.name local-dir:{result.export} --data.val YOUR.csv")


def check_command(arguments: list[str]) -> None:
    """Check a training run before it starts."""
    parser = Parser(prog="accel-clip check", add_help=False, allow_abbrev=False)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--show", type=Path)
    parser.add_argument("--json", action="store_true")
    options, settings = parser.parse_known_args(arguments)
    for name, limits in CHECK_RANGES.items():
        if not limits.holds(getattr(options, name)):
            raise ConfigError(f"accel-clip check: --{name} {shown_value(getattr(options, name))}: {limits.words}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("accel-clip check runs in one process: say how many will train by --processes")
    from accel_clip.commands.check.command import CheckOptions, check
    from accel_clip.commands.check.layout import lines_of

    asked = CheckOptions(options.samples, options.seconds, options.processes, options.show)
    report = check(settings, CHECK_HELP, asked)
    console.result(json.dumps(report.to_dict()) if options.json else for_terminal("\n".join(lines_of(report))))
    if report.exit_code:
        raise SystemExit(report.exit_code)


def for_terminal(text: str) -> str:
    """Return a text without credentials, in characters that the terminal has."""
    encoding = sys.stdout.encoding or "utf-8"
    return printable(masked(text)).encode(encoding, errors="backslashreplace").decode(encoding)


def eval_command(arguments: list[str]) -> None:
    """Evaluate a model."""
    from accel_clip.command_line import parse_config

    as_json = "--json" in arguments
    config = parse_config([word for word in arguments if word != "--json"], "accel-clip eval", EVAL_HELP)
    if config.data.val is None and config.eval.zero_shot is None and not config.eval.also:
        raise ConfigError("data.val: name the held-out pairs to evaluate on, or labelled pictures as eval.zero_shot")
    from accel_clip.process.environment import check_environment

    check_environment(os.environ, config.train)
    from accel_clip.commands.evaluate import evaluate

    metrics = evaluate(config)
    console.result(json.dumps(metrics) if as_json else "\n".join(f"{key:40} {metrics[key]:.4f}" for key in metrics))


def export_command(arguments: list[str]) -> None:
    """Export a run's model."""
    parser = Parser(prog="accel-clip export", description="Write a run's model as a folder that open_clip loads.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--to", type=Path, help="folder to write; default: RUN/export")
    parser.add_argument("--push", metavar="ORG/NAME", help="also upload it to the Hugging Face hub")
    options = parser.parse_args(arguments)
    from accel_clip.commands.export import export_run, push_to_hub

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
    from accel_clip.commands.listing import entries

    rows = entries(options.kind, options.plugins)
    if not rows:
        console.say(f"no {options.kind} are registered: name files that do so by --plugins")
        return
    width = max(len(name) for name, _ in rows)
    console.result("\n".join(f"{name:{width}}  {description}".rstrip() for name, description in rows))


def plot_command(arguments: list[str]) -> None:
    """Draw a run's pictures."""
    parser = Parser(prog="accel-clip plot", description="Draw a run's curves and retrieval examples as pictures.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--to", type=Path, help="folder to write; default: RUN/plots")
    options = parser.parse_args(arguments)
    from accel_clip.commands.plots import plot_run

    for picture in plot_run(options.run, options.to or options.run / "plots"):
        console.result(str(picture))


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are those of this program."""

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError` with the message."""
        raise ConfigError(f"{self.prog}: {message} (see {self.prog} --help)")
