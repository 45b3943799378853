"""python benchmarks/walk.py --minutes 30: a random walk of faults over small runs, in one process and in two.

Every run trains a small model with dropped patches on pictures of its own. Until it is complete, one fault after the
other happens to it: kills of all its processes at any moment between launch and end, SIGTERM, Ctrl-C, a disk that takes
no more, a second start beside it, a terminal that is gone, damaged and unmounted checkpoints, edited, reordered and
renamed inputs, files of somebody else in its folders, exports of the stopped run. After each the same command is given
again. Wrong is: another exit code than the fault stands for, a traceback of ours, a changed file of the user's, a
process that stays, and a complete run whose export or losses are not those of the run that nothing happened to.

Prints a row per event and a verdict; exit code 1 when anything was wrong. `--only kill` is a soak of kills.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {
        **{"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "patch_dropout": 0.5,
    },
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PLUGIN = '''"""A loss of the user's."""

import torch
from accel_clip import LOSSES


@LOSSES.register("mine")
def mine(image_features, text_features, logit_scale, output_dict=True):
    """Images against texts."""
    logits = logit_scale * image_features @ text_features.T
    return {"mine_loss": torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))}
'''
NUM_PAIRS = 120
NUM_STEPS = 120
SETTINGS = (
    *("--data.train", "data/pairs.csv", "--plugins", "loss.py", "--loss.name", "mine", "--model.name", "model.json"),
    *("--optim.name", "adamw", "--train.batch_size", "16", "--train.threads", "1", "--train.steps", str(NUM_STEPS)),
    *("--data.workers", "1", "--data.val_fraction", "0.1", "--data.image_cache_gib", "0.1", "--eval.every", "40"),
    *("--checkpoint.every", "8", "--track.to", "[]", "--track.every", "1"),
)
LAUNCHERS = {
    1: (sys.executable,),
    2: (
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ROOT / "accelerate_configs" / "cpu_2.yaml")),
    ),
}
SECONDS_TO_END = 240


class WrongEnd(Exception):
    """Something happened that no fault stands for."""


class NothingToDo(Exception):
    """A fault has nothing to befall as the run stands."""


class Run:
    """One run in a folder with its inputs, and what happens to it."""

    def __init__(self, folder: Path, name: str, num_processes: int, draw: random.Random) -> None:
        self.folder, self.num_processes, self.draw = folder, num_processes, draw
        self.output = folder / name
        self.seconds = 60.0

    # --- starts

    def start(self, most_bytes: int | None = None, terminal: int | None = None) -> subprocess.Popen[bytes]:
        """Give the command; what it says is in a file beside the run.

        most_bytes: what a file may hold, as on a full disk; terminal: where it writes instead of the file.
        """

        with self.said().open("wb") as said:
            process = subprocess.Popen(
                [*LAUNCHERS[self.num_processes], str(ROOT / "train.py"), *SETTINGS, "--output_dir", self.output.name],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=said if terminal is None else terminal,
                stderr=said if terminal is None else terminal,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
            )
        if most_bytes is not None:
            psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (most_bytes, most_bytes))
        return process

    def said(self) -> Path:
        """Return the file with what the last start said."""
        return self.output.with_suffix(".txt")

    def end_of(self, process: subprocess.Popen[bytes]) -> int | None:
        """Wait for a run's end and return what it ended with: its exit code, also where a launcher hides it."""
        try:
            code = process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            kill_all(process)
            raise WrongEnd(f"it did not end in {SECONDS_TO_END} s") from None
        self.require_no_traceback()
        return self.told_code() if self.num_processes > 1 and code != 0 else code

    def told_code(self) -> int | None:
        """Return the exit code that the last start told: of the process that ended first, or else in `STATUS.json`."""
        said = self.said().read_text(errors="replace")
        if "training on" in said:
            return self.status().get("exit_code")
        first = re.search(r"Root Cause.*?exitcode +: (\d+)", said, re.DOTALL)
        if first is not None:
            return int(first[1])
        return (
            2 if "accel-clip: error: " in said and "[Errno 27]" not in said else None
        )  # a full disk cuts what is said

    def status(self) -> dict[str, object]:
        """Return `STATUS.json`, empty before the first start."""
        file = self.output / "STATUS.json"
        status: dict[str, object] = json.loads(file.read_text()) if file.exists() else {}
        return status

    def require_no_traceback(self) -> None:
        """Raise `WrongEnd` where the last start showed a traceback through our code."""
        said = self.said().read_text(errors="replace")
        if re.search(r'File ".*accel_clip/accel_clip/.*", line \d+|File ".*/accel_clip/\w+\.py", line', said):
            raise WrongEnd("a traceback:\n" + said[-3000:])

    def go_on(self) -> None:
        """Give the command again and let it run to its end."""
        self.expect(self.end_of(self.start()), 0)

    def refused(self, words: str) -> None:
        """Give the command and expect that it is refused, in words."""
        self.expect(self.end_of(self.start()), 2, 3)
        said = self.said().read_text(errors="replace")
        if not re.search(words, said):
            raise WrongEnd(f"refused without {words!r}:\n{said[-1500:]}")

    def expect(self, code: int | None, *codes: int | None) -> None:
        """Raise `WrongEnd` for another exit code than these."""
        if code not in codes:
            raise WrongEnd(f"exit code {code}, not {codes}:\n{self.said().read_text(errors='replace')[-3000:]}")

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """Start the run and hand it over at a moment drawn between its launch and its end."""
        process = self.start()
        self.wait_for_a_moment(process)
        try:
            yield process
        finally:
            if process.poll() is None:
                kill_all(process)

    def wait_for_a_moment(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until a step drawn anew, or else for a time in the start, or until the run is over."""
        until = time.monotonic() + self.draw.uniform(0.0, self.seconds)
        step = self.draw.randint(min(last_step(self.output) + 1, NUM_STEPS), NUM_STEPS)
        in_the_start = self.draw.random() < 0.3
        while process.poll() is None and time.monotonic() < (until if in_the_start else until + SECONDS_TO_END):
            if not in_the_start and last_step(self.output) >= step:
                time.sleep(self.draw.uniform(0.0, 0.3))
                return
            time.sleep(0.02)

    # --- what happens

    def kill(self) -> None:
        """SIGKILL to all processes."""
        with self.running() as process:
            kill_all(process)

    def terminate(self) -> None:
        """SIGTERM to the launcher."""
        with self.running() as process:
            process.terminate()
            self.expect(self.end_of(process), 0, 75, 130, None, -int(signal.SIGTERM))

    def interrupt(self) -> None:
        """Ctrl-C to all processes."""
        with self.running() as process:
            for each in [*children_of(process), psutil.Process(process.pid)] if process.poll() is None else []:
                send(each, signal.SIGINT)
            self.expect(self.end_of(process), 0, 75, 130, None, -int(signal.SIGINT))

    def full_disk(self) -> None:
        """No file may grow beyond a size drawn anew."""
        process = self.start(most_bytes=int(10 ** self.draw.uniform(1.5, 6.5)))
        code = self.end_of(process)
        by_memory = "shared memory" in self.said().read_text(errors="replace")  # which the limit on files holds too
        self.expect(code, 0, 5, None, *((3,) if by_memory else ()))

    def second_start(self) -> None:
        """The same command beside the run; the first goes on."""
        with self.running() as process:
            first = self.said().rename(self.said().with_suffix(".first.txt"))
            is_over = process.poll() is not None
            second = self.start()
            code = self.end_of(second)
            first.rename(self.said())
            self.expect(code, *((0,) if is_over else (0, 2)))
            if process.poll() is None and code == 0 and self.status().get("state") != "complete":
                raise WrongEnd("two processes own one folder")
            self.expect(self.end_of(process), 0, 2)

    def lost_terminal(self) -> None:
        """What the run writes to is closed."""
        reading, writing = os.pipe()
        process = self.start(terminal=writing)
        os.close(writing)
        os.read(reading, 1)
        os.close(reading)
        self.expect(self.end_of(process), 0)

    def damage(self) -> None:
        """A byte of the newest checkpoint flips."""
        steps = sorted((self.output / "checkpoints").glob("step-" + "[0-9]" * 8))
        if len(steps) < 2 or self.is_complete():
            raise NothingToDo
        file = self.draw.choice([path for path in steps[-1].iterdir() if path.stat().st_size and path.name[0] != "."])
        content = bytearray(file.read_bytes())
        content[self.draw.randrange(len(content))] ^= 0x10
        file.write_bytes(bytes(content))

    def unmount(self) -> None:
        """The checkpoints lie on a disk that is not there; then it is."""
        checkpoints, disk = self.output / "checkpoints", self.folder / "disk"
        if not self.may_go_on():
            raise NothingToDo
        checkpoints.rename(disk)
        if self.draw.random() < 0.5:
            checkpoints.symlink_to(self.folder / "not-there")
        try:
            self.refused("mount")
        finally:
            checkpoints.unlink(missing_ok=True)
            disk.rename(checkpoints)

    def edit(self) -> None:
        """An input is edited, and put back."""
        file = self.folder / self.draw.choice(["data/pairs.csv", "model.json", "loss.py"])
        before, stamps = file.read_bytes(), file.stat()
        if not self.may_go_on():
            raise NothingToDo
        if file.suffix == ".csv":
            head, *rows = before.decode().splitlines()
            rows = rows[::-1] if self.draw.random() < 0.5 else [row.replace("picture", "pikture") for row in rows]
            file.write_text("\n".join([head, *rows]) + "\n")
        elif file.suffix == ".json":
            file.write_text(before.decode().replace('"patch_dropout": 0.5', '"patch_dropout": 0.4'))
        else:
            file.write_text(before.decode().replace("logit_scale *", "0.5 * logit_scale *"))
        try:
            self.refused(file.name)
        finally:
            file.write_bytes(before)
            os.utime(file, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))

    def rename_input(self) -> None:
        """An input has another name, and then its own again."""
        names = ["data", "data/pairs.csv", "loss.py", *([] if self.has_checkpoint() else ["model.json"])]
        file = self.folder / self.draw.choice(names)  # of a model a checkpoint knows all
        away = file.with_name("renamed")
        if self.is_complete():
            raise NothingToDo
        file.rename(away)
        try:
            self.refused(file.name)
        finally:
            away.rename(file)

    def foreign_file(self) -> None:
        """A file of somebody else lies where the run would replace a folder; then it is gone."""
        place = self.output / self.draw.choice(["export", "pictures"])
        if self.is_complete():
            raise NothingToDo
        place.mkdir(parents=True, exist_ok=True)
        (place / "thesis.txt").write_text("years of work")
        try:
            self.refused(r"thesis\.txt")
            if (place / "thesis.txt").read_text() != "years of work":
                raise WrongEnd("the file of somebody else is changed")
        finally:
            (place / "thesis.txt").unlink()
            if not list(place.iterdir()):
                place.rmdir()

    def export(self) -> None:
        """The model of the stopped run is exported, killed at any moment, then not."""
        if not self.has_checkpoint():
            raise NothingToDo
        words = [sys.executable, "-c", "import sys; from accel_clip.cli import main; sys.exit(main())", "export"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        to = self.draw.choice([[], ["--to", "exported"]])
        for is_killed in (True, False):
            with self.said().open("wb") as said:
                process = subprocess.Popen(
                    [*words, self.output.name, *to], cwd=self.folder, stdout=said, stderr=said, env=environment
                )
            if is_killed:
                try:
                    process.wait(self.draw.uniform(1, 12))
                except subprocess.TimeoutExpired:
                    process.kill()
                process.wait()
            else:
                self.expect(process.wait(SECONDS_TO_END), 0)
                self.require_no_traceback()

    def lose_export(self) -> None:
        """The export is removed by hand, and the command given again."""
        if not (self.output / "export").exists():
            raise NothingToDo
        shutil.rmtree(self.output / "export")

    def has_checkpoint(self) -> bool:
        """Return whether something of the run is saved."""
        return bool(list((self.output / "checkpoints").glob("step-" + "[0-9]" * 8)))

    def is_complete(self) -> bool:
        """Return whether a start would have nothing to do."""
        return self.status().get("state") == "complete" and (self.output / "export").exists()

    def may_go_on(self) -> bool:
        """Return whether a start would go on from a checkpoint."""
        return self.has_checkpoint() and not self.is_complete()


EVENTS: dict[str, tuple[Callable[[Run], None], int]] = {
    "kill": (Run.kill, 6),
    "terminate": (Run.terminate, 2),
    "interrupt": (Run.interrupt, 1),
    "full_disk": (Run.full_disk, 2),
    "second_start": (Run.second_start, 1),
    "lost_terminal": (Run.lost_terminal, 1),
    "damage": (Run.damage, 2),
    "unmount": (Run.unmount, 1),
    "edit": (Run.edit, 2),
    "rename_input": (Run.rename_input, 1),
    "foreign_file": (Run.foreign_file, 1),
    "export": (Run.export, 1),
    "lose_export": (Run.lose_export, 1),
}
"""What may happen, and how often compared with the others."""


def children_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return everything that a launch has started and that lives."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal to a process unless it is gone."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """End a launch with everything it has started, by SIGKILL; workers of a launcher are in sessions of their own."""
    everyone = children_of(process)
    process.kill()
    for each in everyone:
        send(each, signal.SIGKILL)
    psutil.wait_procs(everyone, timeout=30)
    process.wait()


def last_step(run: Path) -> int:
    """Return the last step in `metrics.jsonl`, 0 before the first."""
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines() if file.exists() else []
    found = re.search(rb'"step": (\d+)', lines[-1]) if lines else None
    return 0 if found is None else int(found[1])


def losses_of(run: Path) -> list[tuple[int, float]]:
    """Return the training losses with their steps, as they stand in `metrics.jsonl`."""
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(point["step"], point["loss"]) for point in points if "loss" in point]


def end_of_run(run: Path) -> tuple[bytes, list[tuple[int, float]]]:
    """Return what must be the same at the end of every run: the exported weights and the losses."""
    return (run / "export" / "open_clip_model.safetensors").read_bytes(), losses_of(run)


def inputs_of(folder: Path) -> dict[str, str]:
    """Return the hash of every file that is the user's."""
    files = [folder / "model.json", folder / "loss.py", *sorted((folder / "data").rglob("*"))]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def write_inputs(folder: Path) -> None:
    """Write pictures with captions, a model and a loss."""
    (folder / "data").mkdir()
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "loss.py").write_text(PLUGIN)
    draw, rows = random.Random(0), ["image,caption"]
    for number in range(NUM_PAIRS):
        colour = tuple(draw.randrange(256) for _ in range(3))
        noise = Image.frombytes("RGB", (40, 36), draw.randbytes(3 * 40 * 36))
        Image.blend(noise, Image.new("RGB", (40, 36), colour), 0.7).save(folder / "data" / f"{number}.png")
        rows.append(f"{number}.png,picture {number} of colour {colour[0] // 32}")
    (folder / "data" / "pairs.csv").write_text("\n".join(rows) + "\n")


class Walk:
    """Faults drawn one after the other, until it is late."""

    def __init__(self, folder: Path, num_processes: int, names: Sequence[str], draw: random.Random) -> None:
        self.folder, self.num_processes, self.names, self.draw = folder, num_processes, names, draw
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.num_runs = 0

    def go(self, until: float) -> None:
        """Walk until a time by the monotonic clock; the run that is going on then is brought to its end."""
        whole = Run(self.folder, f"whole-{self.num_processes}", self.num_processes, self.draw)
        begin = time.monotonic()
        whole.go_on()
        seconds, self.reference = time.monotonic() - begin, end_of_run(whole.output)
        say(f"{self.num_processes} process(es): the run that nothing happens to takes {seconds:.1f} s")
        while time.monotonic() < until:
            self.num_runs += 1
            run = Run(self.folder, f"run-{self.num_processes}-{self.num_runs}", self.num_processes, self.draw)
            run.seconds = seconds
            self.walk(run, until)

    def walk(self, run: Run, until: float) -> None:
        """Let faults happen to a run until it has been complete and one more has happened, then look at its end."""
        weights = [EVENTS[name][1] for name in self.names]
        num_left = 12
        while num_left and time.monotonic() < until:
            num_left = 1 if run.is_complete() and num_left > 1 else num_left - 1
            with suppress(NothingToDo):
                self.happen(run, self.draw.choices(self.names, weights)[0])
        self.check("the end", run, run.go_on)
        self.check("the end", run, lambda: self.compare(run))
        shutil.rmtree(run.output, ignore_errors=True)

    def happen(self, run: Run, name: str) -> None:
        """Let one fault happen, and look whether the user's files are what they were."""
        before, begin = inputs_of(self.folder), time.monotonic()
        self.check(name, run, lambda: EVENTS[name][0](run))
        self.counts[name] += 1
        if inputs_of(self.folder) != before:
            self.wrong.append(f"{name}: a file of the user's is changed")
        say(f"{self.num_processes} {run.output.name:>10} {name:>14} {time.monotonic() - begin:6.1f} s {state_of(run)}")

    def check(self, name: str, run: Run, action: Callable[[], object]) -> None:
        """Do something and take down what was wrong with it."""
        try:
            action()
        except WrongEnd as wrong:
            self.wrong.append(f"{name} of {run.output.name}: {wrong}")
            say(f"WRONG: {self.wrong[-1]}")

    def compare(self, run: Run) -> None:
        """Raise `WrongEnd` unless a run ended as the one that nothing happened to."""
        weights, losses = end_of_run(run.output)
        if weights != self.reference[0]:
            raise WrongEnd("another export")
        if losses != self.reference[1]:
            raise WrongEnd("other losses")
        left = list(run.output.rglob(".accel_clip-*"))
        if left:
            raise WrongEnd(f"left behind: {left}")


def state_of(run: Run) -> str:
    """Return where a run stands, for a row."""
    status = run.status()
    return f"{status.get('state', 'not begun')} {status.get('step', '')}"


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Walk with one process, then with two, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="over both numbers of processes")
    parser.add_argument("--seed", type=int, default=0, help="of what happens when")
    parser.add_argument("--only", nargs="*", choices=EVENTS, help="these faults alone")
    parser.add_argument("--processes", nargs="*", type=int, choices=LAUNCHERS, default=list(LAUNCHERS))
    options = parser.parse_args(arguments)
    names = options.only or list(EVENTS)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    num_runs = 0
    for num_processes in options.processes:
        with tempfile.TemporaryDirectory(prefix="walk-") as name:
            write_inputs(Path(name))
            walk = Walk(Path(name), num_processes, names, random.Random(f"{options.seed} {num_processes}"))
            walk.go(time.monotonic() + 60 * options.minutes / len(options.processes))
        counts, wrong, num_runs = counts + walk.counts, wrong + walk.wrong, num_runs + walk.num_runs
    say(", ".join(f"{name} {number}" for name, number in counts.most_common()))
    say(f"{counts.total()} events in {num_runs} runs, {len(wrong)} wrong ends")
    return 1 if wrong or not counts else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
