"""Real launches that are killed, stopped, starved or poisoned: how they end, what they leave, and that they go on."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from accel_clip.checkpoint.manifest import verify
from helpers.commands import CPU_2, ROOT, launch, without_torch
from helpers.comparison import ADDITIONS_OF_A_STEP, rounding
from helpers.launches import (
    ALONE,
    CPU_1,
    NUM_STEPS,
    SLOWLY,
    FolderOfLaunches,
    export_of,
    losses_by_step,
    newest,
    status_of,
)

pytestmark = pytest.mark.slow


def assert_same_end(run: Path, whole: Path) -> None:
    assert losses_by_step(run) == losses_by_step(whole) and len(losses_by_step(run)) == NUM_STEPS
    assert export_of(run) == export_of(whole)


def assert_preempted(run: Path, at_least: int) -> int:
    """Return the step at which a run has stopped and been saved, short of its end."""
    status = status_of(run)
    assert (status["state"], status["exit_code"]) == ("preempted", 75), status
    assert "train.py" in status["resume_command"]
    assert at_least <= status["step"] < NUM_STEPS
    assert verify(newest(run)).step == status["step"] == max(losses_by_step(run))
    return int(status["step"])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> FolderOfLaunches:
    """Return a folder with runs that nobody disturbed: `whole-1` by one process, `whole-2` by two."""
    folder = FolderOfLaunches(tmp_path_factory.mktemp("launches"))
    for name, launcher in (("whole-1", ALONE), ("whole-2", CPU_2)):
        done = folder.finish(launcher, name)
        assert done.code == 0, done.err
    return folder


def test_two_killed_processes_end_like_two_that_were_not(shared: FolderOfLaunches) -> None:
    crashed = shared.finish(CPU_2, "killed", ACCEL_CLIP_FAULT="step:5")  # both end with 9, torchrun with 1
    assert crashed.code != 0 and max(losses_by_step(shared.path / "killed")) == 4
    launch = shared.start(CPU_2, "killed", **SLOWLY)
    launch.wait_for_step(8)
    launch.kill()
    assert "going on from" in launch.text()
    done = shared.finish(CPU_2, "killed")
    assert done.code == 0, done.err
    assert_same_end(shared.path / "killed", shared.path / "whole-2")


def test_three_killed_processes_end_like_three_that_were_not(tmp_path: Path) -> None:
    """From three processes on it matters in which order gradients are added up."""
    two = (ROOT / "accelerate_configs" / "cpu_2.yaml").read_text()
    (tmp_path / "cpu_3.yaml").write_text(two.replace("num_processes: 2", "num_processes: 3"))
    folder, launcher = FolderOfLaunches(tmp_path), ("--config_file", str(tmp_path / "cpu_3.yaml"))
    words = ("--train.batch_size", "9")
    whole = folder.finish(launcher, "whole", *words)
    assert whole.code == 0 and "training on 3 process(es)" in whole.err, whole.err
    assert folder.finish(launcher, "killed", *words, ACCEL_CLIP_FAULT="step:7").code != 0
    done = folder.finish(launcher, "killed", *words)
    assert done.code == 0 and "going on from" in done.err, done.err
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


def test_another_number_of_processes_goes_on_to_rounding(tmp_path: Path) -> None:
    folder = FolderOfLaunches(tmp_path, patch_dropout=0)  # which is drawn by each process for itself
    steps = ("--train.steps", "8", "--checkpoint.every", "4")
    whole = folder.finish(ALONE, "whole", *steps)
    assert whole.code == 0, whole.err
    assert folder.finish(CPU_2, "run", *steps, ACCEL_CLIP_FAULT="latest:4").code != 0
    other_batch = folder.finish(ALONE, "run", *steps, "--train.batch_size", "4")
    assert other_batch.code == 2
    assert "train.batch_size" in other_batch.err and " 8, and now it is 4" in other_batch.err
    done = folder.finish(ALONE, "run", *steps)
    assert done.code == 0, done.err
    assert "step-00000004" in done.err and "equal to rounding only" in done.err
    losses, expected = losses_by_step(tmp_path / "run"), losses_by_step(tmp_path / "whole")
    assert list(losses) == list(range(1, 9))
    assert losses == pytest.approx(expected, rel=rounding(8 * ADDITIONS_OF_A_STEP))
    assert len({round(loss, 3) for loss in losses.values()}) > 4  # it trains, so that equality means something


def test_sigterm_to_the_launcher_of_one_process_saves_and_leaves_nobody(shared: FolderOfLaunches) -> None:
    launch = shared.start(CPU_1, "launcher", **SLOWLY)
    launch.wait_for_step(3)
    everyone = launch.everyone()
    assert len(everyone) == 2
    launch.process.terminate()
    launch.ended(everyone)
    assert_preempted(shared.path / "launcher", at_least=3)
    resume = status_of(shared.path / "launcher")["resume_command"]
    done = subprocess.run(resume, shell=True, cwd=shared.path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_end(shared.path / "launcher", shared.path / "whole-1")


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_of_two_processes_stops_both_at_one_step(shared: FolderOfLaunches, rank: int) -> None:
    run = shared.path / f"rank-{rank}"
    launch = shared.start(CPU_2, run.name, **SLOWLY)
    launch.wait_for_step(3)
    everyone, trainers = launch.everyone(), launch.trainers()
    assert len(trainers) == 2
    trainers[rank].terminate()
    done = launch.ended(everyone)
    step = assert_preempted(run, at_least=3)
    assert done.err.count(f"stopped at step {step} and saved") == 1
    assert shared.finish(CPU_2, run.name).code == 0
    assert_same_end(run, shared.path / "whole-2")


@pytest.mark.parametrize("launcher", [CPU_1, CPU_2], ids=["1", "2"])
def test_ctrl_c_saves_and_the_same_command_goes_on(shared: FolderOfLaunches, launcher: tuple[str, ...]) -> None:
    run = shared.path / f"interrupted-{len(launcher)}"
    launch = shared.start(launcher, run.name, **SLOWLY)
    launch.wait_for_step(3)
    everyone = launch.everyone()
    os.killpg(launch.process.pid, signal.SIGINT)
    launch.ended(everyone)
    assert_preempted(run, at_least=3)
    assert shared.finish(launcher, run.name).code == 0
    assert_same_end(run, shared.path / ("whole-1" if launcher == CPU_1 else "whole-2"))


def test_sigterm_in_an_evaluation_does_not_wait_for_its_end(tmp_path: Path) -> None:
    folder, run = FolderOfLaunches(tmp_path), tmp_path / "run"
    settings = ("--data.val", "late:", "--eval.every", "3", "--eval.batch_size", "8", "--checkpoint.every", "100")
    launch = folder.start(ALONE, "run", *settings, **SLOWLY)
    launch.wait_for_step(1)
    (tmp_path / "late").touch()  # from here on an evaluation takes 13 seconds
    launch.wait_for_step(3)
    time.sleep(0.5)
    launch.process.terminate()
    done = launch.ended(launch.everyone())
    assert done.code == 75, done.err
    assert not any("val/loss" in line for line in (run / "metrics.jsonl").read_text().splitlines()[1:])
    assert assert_preempted(run, at_least=3) == 3
    (tmp_path / "late").unlink()
    again = folder.finish(ALONE, "run", *settings)
    assert again.code == 0, again.err
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points if "val/text_to_image_R@1" in point] == [0, 3, 6, 9, 12]


def test_a_loss_without_a_value_on_one_process_ends_both_before_the_weights_change(shared: FolderOfLaunches) -> None:
    run = shared.path / "nan"
    done = shared.finish(CPU_2, "nan", "--checkpoint.every", "1", NAN="1:3")
    assert done.code != 0
    assert done.err.count("step 3 is not finite") == 1
    for part in ("loss/both_loss nan", "samples ", "train.non_finite"):
        assert part in done.err, done.err
    status = status_of(run)
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 4, 2)
    assert "step 3 is not finite" in status["error"]
    assert verify(newest(run)).step == 2
    weights = load_file(newest(run) / "model.safetensors")
    assert weights and all(torch.isfinite(each).all() for each in weights.values())
    again = shared.finish(CPU_2, "nan", "--checkpoint.every", "1")  # without the trouble it goes on as if never met
    assert again.code == 0, again.err
    assert_same_end(run, shared.path / "whole-2")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that mounts a file system of so many bytes."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(num_bytes: int) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "none", str(disk)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode != 0:
            pytest.skip("no file system may be mounted here")
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", str(disk)], check=True)


def bytes_of(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.iterdir())


def test_a_disk_that_fills_up_ends_the_run_and_leaves_its_checkpoint(
    shared: FolderOfLaunches, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(bytes_of(newest(shared.path / "whole-1")) * 3 // 2)
    done = shared.finish(ALONE, str(disk / "run"), **SLOWLY)
    assert done.code == 5, done.err
    assert says_what_is_missing(done.err)
    status = status_of(disk / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    assert verify(newest(disk / "run")).step == 2
    assert [path.name for path in (disk / "run" / "checkpoints").glob(".accel_clip-*")] == []


def test_a_disk_without_room_for_one_checkpoint_is_told_before_training(
    shared: FolderOfLaunches, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(bytes_of(newest(shared.path / "whole-1")) // 2)
    done = shared.finish(ALONE, str(disk / "run"))
    assert done.code == 5, done.err
    assert says_what_is_missing(done.err)
    assert not (disk / "run" / "metrics.jsonl").exists()


def says_what_is_missing(text: str) -> bool:
    """Return whether one line has the bytes that a checkpoint needs and those there are."""
    lines = [line.split() for line in text.splitlines() if "disk full" in line]
    (numbers,) = [[int(word) for word in line if word.isdigit()] for line in lines]
    needed, available = numbers
    return needed > available > 0


def test_a_process_that_hangs_ends_the_launch_and_shows_the_stacks_of_both(tmp_path: Path) -> None:
    folder = FolderOfLaunches(tmp_path)
    launch = folder.start(CPU_2, "run", "--train.timeout", "5", HANG="1:4")
    launch.wait_for_step(3)
    everyone = launch.everyone()
    done = launch.ended(everyone)
    assert done.code != 0
    for rank in (0, 1):
        assert f"rank {rank}: no progress for" in done.err and f"rank {rank} | " in done.err, done.err
    assert "last done: step 3" in done.err
    assert 'troubled.py", line' in done.err  # where the one that hangs stands
    assert status_of(tmp_path / "run")["exit_code"] == 1
    assert verify(newest(tmp_path / "run")).step == 2


def test_a_finished_run_is_left_as_it_is_and_torch_is_not_needed_for_that(tmp_path: Path) -> None:
    folder, run = FolderOfLaunches(tmp_path), tmp_path / "run"
    builtin = ("--plugins", "[]", "--loss.name", "clip", "--train.steps", "2")
    assert folder.finish(ALONE, "run", *builtin).code == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = folder.finish(ALONE, "run", *builtin, **without_torch(tmp_path))
    assert again.code == 0, again.err
    assert again.err.strip().startswith("the run in run is complete at step 2") and again.err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    two = folder.finish(CPU_2, "run", *builtin)
    assert two.code == 0 and two.err.count("is complete at step 2") == 1
    longer = folder.finish(ALONE, "run", *builtin[:-1], "3")
    assert longer.code == 0 and losses_by_step(run).keys() == {1, 2, 3}, longer.err


def test_a_killed_data_worker_ends_the_run_with_what_to_do(shared: FolderOfLaunches) -> None:
    run = shared.path / "worker"
    launch = shared.start(ALONE, "worker", "--data.workers", "2", **SLOWLY)
    launch.wait_for_step(3)
    own = psutil.Process(launch.process.pid)
    workers = [child for child in own.children(recursive=True) if child.cmdline() == own.cmdline()]
    assert len(workers) == 2
    everyone = launch.everyone()
    workers[0].kill()
    done = launch.ended(everyone, seconds=30)  # the other worker is not waited for
    assert done.code == 3, done.err
    assert f"a data worker (process {workers[0].pid}) was killed" in done.err and "lower data.workers" in done.err
    assert done.err.count("accel-clip: error:") == 1 and "Traceback" not in done.err
    assert (status_of(run)["state"], status_of(run)["exit_code"]) == ("failed", 3)
    assert verify(newest(run)).step >= 2 and math.isfinite(losses_by_step(run)[3])
    assert shared.finish(ALONE, "worker", "--data.workers", "2").code == 0
    assert_same_end(run, shared.path / "whole-1")


UNEVEN = """
import os
import time

from accel_clip.faults import ConfigError

time.sleep(float(os.environ["SECONDS_OF_RANK_" + os.environ["RANK"]]))
if os.environ["RANK"] == os.environ.get("RANK_THAT_LACKS"):
    raise ConfigError("plugins: it lacks something here")
"""


@pytest.mark.slow
@pytest.mark.parametrize("slow_rank", [0, 1])
def test_why_two_processes_do_not_start_is_said_once_whoever_finds_it_first(tmp_path: Path, slow_rank: int) -> None:
    """The launcher ends both with the first that ends, and only one of them may speak."""
    (tmp_path / "uneven.py").write_text(UNEVEN)
    seconds = {f"SECONDS_OF_RANK_{rank}": "3" if rank == slow_rank else "0" for rank in (0, 1)}
    words = ("--plugins", "uneven.py", "--data.train", "none.csv", "--output_dir", "run")
    refused = launch(*words, folder=tmp_path, launcher=CPU_2, **seconds)
    assert refused.code != 0 and refused.err.count("accel-clip: error: data.train: ") == 1, refused.err


@pytest.mark.slow
def test_what_one_process_alone_lacks_is_said_by_it(tmp_path: Path) -> None:
    (tmp_path / "uneven.py").write_text(UNEVEN)
    environment = {"SECONDS_OF_RANK_0": "0", "SECONDS_OF_RANK_1": "0", "RANK_THAT_LACKS": "1"}
    refused = launch("--plugins", "uneven.py", "--output_dir", "run", folder=tmp_path, launcher=CPU_2, **environment)
    assert refused.code != 0 and refused.err.count("it lacks something here") == 1, refused.err
