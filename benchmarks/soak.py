"""python benchmarks/soak.py --kills 20: kill runs at random moments and compare their ends with an unkilled run's.

Trains a small model with dropped patches by AdamW, in one process and in two. Each run is killed by SIGKILL, with all
its processes, at moments drawn anywhere between its launch and its end (start-up, steps, checkpoints, evaluations,
export), and started again by the same command. When one gets to its end, its export must have the bytes of the
uninterrupted run's and its metrics the same losses; then another begins, until all kills are spent.

Prints a row per kill and a verdict; exit code 1 on a difference, or when a run ends with another code than 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {
        **{"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "patch_dropout": 0.5,
    },
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
SETTINGS = (
    *("--model.name", "model.json", "--optim.name", "adamw", "--train.batch_size", "16", "--train.threads", "1"),
    *("--data.workers", "1", "--data.val_fraction", "0.01", "--eval.every", "25", "--checkpoint.every", "5"),
    *("--track.to", "[]", "--track.every", "1"),
)
LAUNCHERS = {
    1: (sys.executable,),
    2: (
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ROOT / "accelerate_configs" / "cpu_2.yaml")),
    ),
}


@dataclass(frozen=True)
class Kill:
    """One kill: seconds after the launch, the last step in metrics.jsonl then, and what the next start went on from."""

    num_processes: int
    seconds: float
    step: int
    resumed_from: str

    def __str__(self) -> str:
        return f"{self.num_processes:>9} {self.seconds:>11.2f} {self.step:>7} {self.resumed_from:>15}"


class Soak:
    """Runs of one number of processes in a folder."""

    def __init__(self, folder: Path, num_processes: int, num_steps: int) -> None:
        self.folder, self.num_processes, self.num_steps = folder, num_processes, num_steps
        self.run = folder / f"whole-{num_processes}"

    def start(self) -> subprocess.Popen[bytes]:
        """Start the run, or start it again; what it says is in a file beside it."""
        settings = [*SETTINGS, "--train.steps", str(self.num_steps), "--output_dir", str(self.run)]
        with self.said().open("wb") as said:
            return subprocess.Popen(
                [*LAUNCHERS[self.num_processes], str(ROOT / "train.py"), *settings],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )

    def said(self) -> Path:
        """Return the file with what the last start said."""
        return self.run.with_suffix(".txt")

    def to_the_end(self) -> float:
        """Run without a kill and return the seconds it took."""
        begin = time.monotonic()
        self.finish(self.start())
        return time.monotonic() - begin

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for a run's end; raises `SystemExit` when it fails."""
        if process.wait() != 0:
            raise SystemExit(f"exit code {process.returncode}:\n{self.said().read_text(errors='replace')}")

    def step(self) -> int:
        """Return the last step in metrics.jsonl, 0 before the first."""
        return max(losses_of(self.run), default=0)

    def resumed_from(self) -> str:
        """Return what the last start went on from, as far as it came."""
        said = self.said().read_text(errors="replace")
        found = re.search(r"going on from .*(step-\d+)", said)
        if found is not None:
            return found[1]
        if "is complete at step" in said:
            return "its end"
        return "the beginning" if "training on" in said else "(killed before)"

    def same_end(self, other: Path) -> bool:
        """Return whether the run ended with the same export and the same losses as another."""
        weights = Path("export") / "open_clip_model.safetensors"
        same_weights = (self.run / weights).read_bytes() == (other / weights).read_bytes()
        return same_weights and losses_of(self.run) == losses_of(other)


def losses_of(run: Path) -> dict[int, float]:
    """Return the training losses by step; a line that is cut off by a kill is left out."""
    losses = {}
    file = run / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            point = json.loads(line)
        except ValueError:
            continue
        if "loss" in point:
            losses[point["step"]] = point["loss"]
    return losses


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """End a launch with everything it has started, by SIGKILL; workers of a launcher are in sessions of their own."""
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in everyone:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(everyone[1:], timeout=30)
    process.wait()


def soak(folder: Path, num_processes: int, num_kills: int, num_steps: int, until: float, seed: int) -> tuple[int, int]:
    """Kill runs until all kills are spent or it is late, and return how many kills and how many differences there were.

    until: by the monotonic clock; the run that is going on then is brought to its end.
    """
    runs = Soak(folder, num_processes, num_steps)
    longest = runs.to_the_end()
    whole, draw = runs.run, random.Random(f"{seed} {num_processes}")
    say(f"uninterrupted, {num_processes} process(es): {longest:.1f} s")
    killed = num_differences = num_runs = 0
    while killed < num_kills and time.monotonic() < until:
        num_runs += 1
        runs.run = folder / f"killed-{num_processes}-{num_runs}"
        pending: tuple[float, int] | None = None
        over = False
        while not over:
            process, begin = runs.start(), time.monotonic()
            wanted = draw.uniform(0.3, 1.0) * longest
            may_kill = killed < num_kills and begin < until
            try:
                process.wait(wanted if may_kill else None)
                over = True
            except subprocess.TimeoutExpired:
                kill_all(process)
            tell(pending, runs)
            pending = None
            if over:
                runs.finish(process)
            else:
                killed, pending = killed + 1, (time.monotonic() - begin, runs.step())
        same = runs.same_end(whole)
        num_differences += not same
        say(f"run {num_runs} with {num_processes} process(es): {'the same' if same else 'ANOTHER'} export and losses")
    return killed, num_differences


def tell(pending: tuple[float, int] | None, runs: Soak) -> None:
    """Print the row of a kill, once it is known what the next start went on from."""
    if pending is not None:
        say(str(Kill(runs.num_processes, *pending, runs.resumed_from())))


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Soak with one process and with two, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="over both numbers of processes")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no further kill after that")
    parser.add_argument("--steps", type=int, default=100, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    num_kills = num_differences = 0
    say(f"{'processes':>9} {'killed at s':>11} {'step':>7} {'went on from':>15}")
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        (folder / "model.json").write_text(json.dumps(MODEL))
        for number, num_processes in enumerate(LAUNCHERS, 1):
            share = options.kills - num_kills if number == len(LAUNCHERS) else options.kills // len(LAUNCHERS)
            until = begin + 60 * options.minutes * number / len(LAUNCHERS)
            killed, different = soak(folder, num_processes, share, options.steps, until, options.seed)
            num_kills, num_differences = num_kills + killed, num_differences + different
    say(f"{num_kills} kills, {num_differences} runs that ended otherwise than the uninterrupted one")
    return 1 if num_differences or num_kills == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
