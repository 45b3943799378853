"""Checkpoints: bit for bit through a crash in every stage, damage of every kind, and a full disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from safetensors import SafetensorError
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import accel_clip.checkpoint.background as background_module
import accel_clip.checkpoint.write as write_module
from accel_clip.checkpoint.background import Writer
from accel_clip.checkpoint.find import find_best, find_newest, find_newest_for_all, open_checkpoint, recover
from accel_clip.checkpoint.folders import BEST, LATEST, point, pointed, set_aside_newer
from accel_clip.checkpoint.manifest import Checkpoint, library_versions, verify
from accel_clip.checkpoint.restore import load_weights, restore, restore_random
from accel_clip.checkpoint.snapshot import Snapshot, expected_bytes, gather_random_states, take_snapshot
from accel_clip.checkpoint.storage import check_space
from accel_clip.checkpoint.tensors import flatten, unflatten
from accel_clip.checkpoint.write import STAGES, prune, write
from accel_clip.faults import ConfigError, StorageError
from accel_clip.files.names import DRAFT, beside
from accel_clip.optim.optimizers import timm_names
from accel_clip.process.accelerator import forget_previous_accelerator
from helpers.patience import HANG_SECONDS
from helpers.stand_ins import Payload

CPU = torch.device("cpu")
STATE = {"step": 3, "best": None, "counts": [1, 2], "caption": "一只猫", "third": 1 / 3}
fork = multiprocessing.get_context("fork")  # a process of its own without importing torch again


class Small(nn.Module):
    """Dropout, a tied weight, layouts, shapes and dtypes that are easy to lose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.first = nn.Linear(16, 8, bias=False)
        self.tied = nn.Linear(16, 8, bias=False)
        self.tied.weight = self.first.weight
        self.turned = nn.Parameter(torch.randn(8, 6).t())
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("brain_half", torch.randn(5, dtype=torch.bfloat16))
        self.register_buffer("turned_half", torch.randn(4, 6, dtype=torch.float16).t())
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("special", torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("count", torch.tensor(2**53 + 1))

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.conv(image).flatten(1)  # [b, 16]
        mixed = self.first(hidden) + nn.functional.dropout(self.tied(hidden.tanh()), 0.5)
        return self.scale * (self.turned @ mixed.t())


def timm_optimizer(name: str) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: create_optimizer_v2(list(parameters), name, lr=0.01)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=False),
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "sgd_momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adafactorbv": timm_optimizer("adafactorbv"),  # moments in bf16
    "nadamw": timm_optimizer("nadamw"),
}


def build(seed: int, name: str = "adamw") -> tuple[Small, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Small()
    return model, OPTIMIZERS[name](model.parameters())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Take steps on pictures that depend on the step alone; dropout draws from torch's generator."""
    for step in steps:
        image = torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        loss = model(image).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def snapshot_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, is_best: bool = False, state: Any = STATE
) -> Snapshot:
    return take_snapshot(step, model, optimizer, gather_random_states(Accelerator(cpu=True)), state, is_best)


def tiny_snapshot(step: int, is_best: bool = False) -> Snapshot:
    """Return a snapshot that tells its step by its weights; cheap, for everything that is about files."""
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, step)
    return snapshot_of(model, torch.optim.SGD(model.parameters(), lr=0.1), step, is_best, {"step": step})


def bits(value: Any) -> Any:
    """Return nested state in a form that compares equal only for equal dtypes, shapes and bytes."""
    if isinstance(value, Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), bytes(raw.tolist())
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(bits(entry) for entry in value)
    return value


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {LATEST, BEST}


# --- exactness


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_going_on_equals_never_having_stopped(tmp_path: Path, name: str) -> None:
    model, optimizer = build(0, name)
    train(model, optimizer, range(6))  # the reference knows nothing of checkpoints

    stopped, stopped_optimizer = build(0, name)
    train(stopped, stopped_optimizer, range(3))
    checkpoint = verify(write(snapshot_of(stopped, stopped_optimizer, 3), tmp_path, keep=1))
    resumed, resumed_optimizer = build(99, name)
    assert restore(checkpoint, resumed, resumed_optimizer) == STATE
    assert bits(resumed_optimizer.state_dict()) == bits(stopped_optimizer.state_dict())
    assert restore_random(checkpoint, 0, CPU)
    train(resumed, resumed_optimizer, range(3, 6))

    assert bits(resumed.state_dict()) == bits(model.state_dict())
    assert bits(resumed_optimizer.state_dict()) == bits(optimizer.state_dict())
    assert resumed.tied.weight is resumed.first.weight


@pytest.mark.slow
@pytest.mark.parametrize("name", timm_names())
def test_timms_optimizers_go_on_exactly(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, name, timm_optimizer(name))
    with torch.compiler.set_stance("force_eager"):  # kron would compile for a minute
        try:
            train(*build(0, name), range(1))
        except (ImportError, AssertionError, RuntimeError) as problem:
            pytest.skip(f"cannot be used here: {problem}")
        test_going_on_equals_never_having_stopped(tmp_path, name)


def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = build(0)
    weights = load_weights(verify(write(snapshot_of(model, optimizer, 1), tmp_path, keep=1)))
    assert bits(weights) == bits(dict(model.state_dict()))


def test_a_snapshot_is_not_touched_by_the_training_that_goes_on(tmp_path: Path) -> None:
    model, optimizer = build(0)
    train(model, optimizer, range(2))
    before, before_optimizer = bits(dict(model.state_dict())), bits(optimizer.state_dict())
    state = {"counts": [1]}
    snapshot = snapshot_of(model, optimizer, 2, state=state)
    train(model, optimizer, range(2, 4))
    state["counts"].append(2)
    other, other_optimizer = build(1)
    assert restore(verify(write(snapshot, tmp_path, keep=1)), other, other_optimizer) == {"counts": [1]}
    assert bits(dict(other.state_dict())) == before
    assert bits(other_optimizer.state_dict()) == before_optimizer


def test_a_prepared_optimizer_is_restored_like_a_bare_one(tmp_path: Path) -> None:
    model, optimizer = build(0, "adafactorbv")
    train(model, optimizer, range(2))
    checkpoint = verify(write(snapshot_of(model, optimizer, 2), tmp_path, keep=1))
    other, other_optimizer = build(1, "adafactorbv")
    prepared = Accelerator(cpu=True).prepare(other_optimizer)
    restore(checkpoint, other, prepared)
    assert bits(prepared.state_dict()) == bits(optimizer.state_dict())


def test_moments_keep_the_layout_that_fused_kernels_read(tmp_path: Path) -> None:
    model, optimizer = build(0, "adamw_fused")
    train(model, optimizer, range(1))
    checkpoint = verify(write(snapshot_of(model, optimizer, 1), tmp_path, keep=1))
    other, other_optimizer = build(1, "adamw_fused")
    restore(checkpoint, other, other_optimizer)
    assert not other.conv.weight.is_contiguous()
    assert other_optimizer.state[other.conv.weight]["exp_avg"].stride() == other.conv.weight.stride()


def test_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    model, optimizer = build(0)
    train(model, optimizer, range(1))
    checkpoint = verify(write(snapshot_of(model, optimizer, 1), tmp_path, keep=1))
    with pytest.raises(ConfigError, match="another model or optimizer"):
        restore(checkpoint, nn.Linear(2, 2), optimizer)
    with pytest.raises(ConfigError, match="another model or optimizer"):
        restore(checkpoint, model, torch.optim.SGD(model.conv.parameters(), lr=0.1))


def test_nested_state_keeps_tuples_kinds_of_keys_and_dtypes() -> None:
    state = {
        "state": {0: {"step": 3, "Q": [torch.ones(2), torch.tensor(2.0)]}, "1": {}},
        "param_groups": [{"lr": torch.tensor(0.1), "betas": (0.9, 0.999), "dtype": torch.bfloat16, "fused": None}],
        "rng_state": (3, (1, 2**31), None),
        "nan": float("inf"),
    }
    tensors: dict[str, Tensor] = {}
    text = json.dumps(flatten(state, "optimizer", tensors))
    assert bits(unflatten(json.loads(text), tensors)) == bits(state)
    assert set(tensors) == {"optimizer.state.0.Q.0", "optimizer.state.0.Q.1", "optimizer.param_groups.0.lr"}


def test_state_without_a_plain_form_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"keeps a set in its state \(optimizer.state.0\)"):
        flatten({"state": [{1, 2}]}, "optimizer", {})


def test_random_states_belong_to_a_rank_and_a_device(tmp_path: Path) -> None:
    snapshot = tiny_snapshot(1)
    drawn = torch.rand(3)
    checkpoint = verify(write(snapshot, tmp_path, keep=1))
    assert not restore_random(checkpoint, 1, CPU)
    assert not torch.equal(torch.rand(3), drawn)
    assert restore_random(checkpoint, 0, CPU)
    assert torch.equal(torch.rand(3), drawn)


def on_two_processes(folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    torch.manual_seed(rank)
    states = gather_random_states(accelerator)
    drawn = torch.rand(3)
    if rank == 0:
        model = nn.Linear(2, 2)
        write(take_snapshot(7, model, torch.optim.SGD(model.parameters()), states, {}), Path(folder), keep=1)
    accelerator.wait_for_everyone()
    checkpoint = find_newest_for_all(accelerator, Path(folder))
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.num_processes) == (7, 2)
    assert restore_random(checkpoint, rank, CPU)
    assert torch.equal(torch.rand(3), drawn)
    assert find_newest_for_all(accelerator, Path(folder) / "none") is None


def test_two_processes_get_their_own_random_states_back(tmp_path: Path) -> None:
    forget_previous_accelerator()  # the processes are forks and would inherit it
    debug_launcher(on_two_processes, (str(tmp_path),), num_processes=2)


# --- crashes


def exit_code_of(work: Callable[[], object]) -> int | None:
    """Run work in a process of its own and return how it ended."""
    process = fork.Process(target=work)
    process.start()
    process.join(HANG_SECONDS)
    return process.exitcode


@pytest.mark.parametrize("stage", STAGES)
def test_a_crash_in_every_stage_leaves_a_valid_checkpoint(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tiny_snapshot(1), tmp_path, keep=1)
    monkeypatch.setenv("ACCEL_CLIP_FAULT", f"{stage}:2")
    assert exit_code_of(lambda: write(tiny_snapshot(2, is_best=True), tmp_path, keep=1)) == 9
    monkeypatch.delenv("ACCEL_CLIP_FAULT")

    recover(tmp_path)
    newest = find_newest(tmp_path)
    assert newest is not None
    complete = STAGES.index(stage) >= STAGES.index("rename")
    assert newest.step == (2 if complete else 1)
    assert load_weights(newest)["weight"].unique().tolist() == [newest.step]
    assert not [name for name in names(tmp_path) if not name.startswith("step-") or name.endswith(".corrupt")]

    write(tiny_snapshot(3), tmp_path, keep=1)  # and the run goes on
    assert pointed(tmp_path, LATEST) == tmp_path / "step-00000003"
    assert verify(tmp_path / "step-00000003").step == 3


def test_the_hook_ends_only_the_stage_and_step_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEL_CLIP_FAULT", "manifest:2")
    assert exit_code_of(lambda: write(tiny_snapshot(1), tmp_path, keep=1)) == 0
    assert exit_code_of(lambda: write(tiny_snapshot(2), tmp_path, keep=1)) == 9
    monkeypatch.setenv("ACCEL_CLIP_FAULT", "manifest")
    assert exit_code_of(lambda: write(tiny_snapshot(3), tmp_path, keep=1)) == 9


def write_forever(folder: Path) -> None:
    model = nn.Linear(200, 200)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    newest = find_newest(folder)
    step = 0 if newest is None else newest.step
    while True:
        step += 1
        write(snapshot_of(model, optimizer, step), folder, keep=2)


def test_kills_at_any_moment_lose_nothing_that_was_complete(tmp_path: Path) -> None:
    moments, longest = random.Random(0), 0.3
    reached_step = 0
    for attempt in range(60):
        if attempt >= 6 and reached_step:
            break  # on a busy machine the first ones get nowhere
        process = fork.Process(target=write_forever, args=(tmp_path,))
        process.start()
        time.sleep(moments.uniform(0.1, longest))
        latest = pointed(tmp_path, LATEST)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        recover(tmp_path)
        newest = find_newest(tmp_path)
        complete = 0 if latest is None else int(latest.name[5:])
        assert newest is None or newest.step >= max(complete, reached_step)
        assert newest is not None or complete == 0
        reached_step = 0 if newest is None else newest.step
        longest *= 1.0 if reached_step else 1.5
    assert reached_step > 0
    assert not [name for name in names(tmp_path) if ".corrupt" in name or name.startswith(".accel_clip-")]


def test_what_is_half_written_is_removed_and_never_used(tmp_path: Path) -> None:
    write(tiny_snapshot(1), tmp_path, keep=3)
    half = write(tiny_snapshot(2), tmp_path, keep=3).rename(beside(tmp_path / "step-00000002", DRAFT))
    truncate(half / "model.safetensors")
    beside(tmp_path / LATEST, DRAFT).write_text("step-")
    recover(tmp_path)
    assert names(tmp_path) == {"step-00000001"}


def test_a_pointer_that_lags_behind_does_not_decide(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tiny_snapshot(step), tmp_path, keep=3)
    for content in ("step-00000001\n", "step-00000009\n", "../elsewhere\n", ""):
        (tmp_path / LATEST).write_text(content)
        newest = find_newest(tmp_path)
        assert newest is not None
        assert newest.step == 2


# --- damage


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def change_manifest(**changes: Any) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("model.safetensors", truncate, "model.safetensors has"),
    ("model.safetensors", flip_last_byte, "model.safetensors is damaged"),
    ("model.safetensors", Path.unlink, "model.safetensors is missing"),
    ("optimizer.safetensors", flip_last_byte, "optimizer.safetensors is damaged"),
    ("optimizer.json", Path.unlink, "optimizer.json is missing"),
    ("random-0.safetensors", empty, "random-0.safetensors has 0 bytes"),
    ("state.json", flip_last_byte, "state.json is damaged"),
    ("manifest.json", Path.unlink, "manifest.json is missing"),
    ("manifest.json", empty, "manifest.json is not JSON"),
    ("manifest.json", truncate, "manifest.json is not JSON"),
    ("manifest.json", lambda file: file.write_bytes(b"\xff\xfe"), "manifest.json is not JSON"),
    ("manifest.json", lambda file: file.write_text("[]"), "manifest.json: [] does not work"),
    ("manifest.json", change_manifest(format=99), "its format is 99 and this version reads 3"),
    ("manifest.json", change_manifest(step=None), "manifest.json: step: None does not work"),
    ("manifest.json", change_manifest(step=8), "it holds step 8"),
    ("manifest.json", change_manifest(files={}), "does not list the files"),
    ("manifest.json", change_manifest(num_processes=2), "does not list the files"),
    ("manifest.json", change_manifest(num_processes=2**62), "manifest.json: num_processes: 46"),
]


@pytest.mark.parametrize(("file", "damage", "reason"), DAMAGES)
def test_damage_is_told_and_the_one_before_is_used(
    tmp_path: Path, file: str, damage: Callable[[Path], object], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        write(tiny_snapshot(step), tmp_path, keep=3)
    damage(tmp_path / "step-00000002" / file)
    newest = find_newest(tmp_path)
    assert newest is not None
    assert newest.step == 1
    assert names(tmp_path) == {"step-00000001", "step-00000002.corrupt"}
    (line,) = capsys.readouterr().err.splitlines()
    assert "damaged checkpoint step-00000002" in line
    assert reason in line
    assert "step-00000001 is used instead" in line


def test_nothing_that_verifies_is_nothing_to_go_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_newest(tmp_path / "missing") is None
    assert capsys.readouterr().err == ""
    for _ in range(2):
        truncate(write(tiny_snapshot(1), tmp_path, keep=3) / "state.json")
        assert find_newest(tmp_path) is None
        assert "there is no other" in capsys.readouterr().err
    assert names(tmp_path) == {"step-00000001.corrupt", "step-00000001.corrupt-2"}  # the first is still there


def test_a_checkpoint_the_user_named_is_used_or_refused(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tiny_snapshot(step), tmp_path, keep=3)
    moved = (tmp_path / "step-00000001").rename(tmp_path / "mine")
    assert open_checkpoint(moved) == Checkpoint(moved, 1, 1, library_versions())
    flip_last_byte(moved / "model.safetensors")
    with pytest.raises(ConfigError, match=r"checkpoint\.resume: .*mine cannot be used: model\.safetensors is damaged"):
        open_checkpoint(moved)
    with pytest.raises(ConfigError, match=r"manifest\.json is missing"):
        open_checkpoint(tmp_path / "nowhere")
    assert names(tmp_path) == {"mine", "step-00000002"}


def test_other_library_versions_are_told(tmp_path: Path) -> None:
    path = write(tiny_snapshot(1), tmp_path, keep=3)
    assert verify(path).version_changes() == []
    change_manifest(versions={**library_versions(), "torch": "1.0"})(path / "manifest.json")
    assert verify(path).version_changes() == [f"torch 1.0 is now {library_versions()['torch']}"]


# --- pointers and pruning


def test_the_newest_the_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tiny_snapshot(step, is_best=step == 2), tmp_path, keep=2)
    assert names(tmp_path) == {"step-00000002", "step-00000004", "step-00000005"}
    assert pointed(tmp_path, LATEST) == tmp_path / "step-00000005"
    best = find_best(tmp_path)
    assert best is not None
    assert best.step == 2
    point(tmp_path, LATEST, 4)
    point(tmp_path, BEST, 5)
    prune(tmp_path, keep=1)
    assert names(tmp_path) == {"step-00000004", "step-00000005"}
    truncate(tmp_path / "step-00000005" / "model.safetensors")
    assert find_best(tmp_path) is None


def test_a_step_is_replaced_when_it_is_written_again(tmp_path: Path) -> None:
    for state in ("old", "new"):
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters())
        path = write(snapshot_of(model, optimizer, 4, state={"is": state}), tmp_path, keep=3)
    assert restore(verify(path), model, optimizer) == {"is": "new"}
    assert names(tmp_path) == {"step-00000004"}


def test_later_steps_are_set_aside_when_a_run_goes_on_from_before(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tiny_snapshot(step), tmp_path, keep=3)
    set_aside_newer(tmp_path, 1)
    newest = find_newest(tmp_path)
    assert newest is not None
    assert newest.step == 1
    assert "step-00000003.superseded" in names(tmp_path)


# --- room on the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount 1 MiB, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def bulky_snapshot(step: int, in_text: bool) -> Snapshot:
    """Return a snapshot of 600 KB, mostly weights or mostly text."""
    model = nn.Linear(2 if in_text else 150_000, 1)
    state = {"text": "x" * (600_000 if in_text else 1)}
    return snapshot_of(model, torch.optim.SGD(model.parameters()), step, state=state)


@pytest.mark.parametrize("in_text", [False, True], ids=["tensors", "text"])
@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_is_told_and_harms_nothing(
    small_disk: Path, foreseen: bool, in_text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(bulky_snapshot(1, in_text), small_disk, keep=3)
    if not foreseen:
        monkeypatch.setattr(write_module, "check_space", lambda folder, needed: None)
    snapshot = bulky_snapshot(2, in_text)
    with pytest.raises(StorageError) as caught:
        write(snapshot, small_disk, keep=3)
    assert caught.value.exit_code == 5
    assert f"disk full: a checkpoint needs {snapshot.num_bytes} bytes and " in str(caught.value)
    available = int(str(caught.value).split(" bytes and ")[1].split()[0])
    assert 100_000 < available < 600_000  # what is free once the half-written files are gone
    assert str(small_disk) in str(caught.value)
    assert names(small_disk) == {"step-00000001"}
    assert verify(small_disk / "step-00000001").step == 1


@pytest.mark.parametrize("in_text", [False, True], ids=["tensors", "text"])
def test_a_limit_on_file_sizes_is_told_like_a_full_disk(tmp_path: Path, in_text: bool) -> None:
    snapshot = bulky_snapshot(1, in_text)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        try:
            write(snapshot, tmp_path, keep=3)
        except StorageError as error:
            os._exit(error.exit_code if "disk full" in str(error) else 1)

    assert exit_code_of(limited) == 5
    assert names(tmp_path) == set()


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="no checkpoint could be written"):
        write(tiny_snapshot(1), tmp_path / "file" / "checkpoints", keep=1)


def test_the_room_a_checkpoint_needs_is_known_beforehand(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(100, 300), nn.Linear(300, 50))
    optimizer = torch.optim.AdamW(model.parameters())
    expected = expected_bytes(model, optimizer)
    model(torch.randn(2, 100)).sum().backward()
    optimizer.step()
    snapshot = snapshot_of(model, optimizer, 1)
    path = write(snapshot, tmp_path, keep=1)
    taken = sum(file.stat().st_size for file in path.iterdir() if file.name != "manifest.json")
    assert taken <= snapshot.num_bytes <= 1.1 * taken
    assert 0.9 * taken <= expected <= 1.1 * taken
    check_space(tmp_path / "not" / "yet", snapshot.num_bytes)
    with pytest.raises(StorageError, match=f"needs {10**18} bytes and [0-9]+ are available at .*yet"):
        check_space(tmp_path / "not" / "yet", 10**18)


# --- nothing is unpickled


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("something was unpickled")


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    payload = pickle.dumps(Payload(mark))
    pickle.loads(payload)
    assert mark.exists()  # the payload works
    mark.unlink()

    model, optimizer = build(0)
    train(model, optimizer, range(1))
    path = write(snapshot_of(model, optimizer, 1), tmp_path / "checkpoints", keep=1)
    for name in ("model.pt", "optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "state.pickle"):
        (path / name).write_bytes(payload)
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    newest = find_newest(tmp_path / "checkpoints")
    assert newest is not None
    restore(newest, model, optimizer)
    assert restore_random(newest, 0, CPU)

    (path / "model.safetensors").write_bytes(payload)  # past the hashes, as someone who wrote the manifest too
    with pytest.raises(SafetensorError):
        restore(newest, model, optimizer)
    assert not mark.exists()


# --- in the background


def test_a_writer_goes_on_beside_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on = threading.Event()

    def slow_write(snapshot: Snapshot, folder: Path, keep: int) -> Path:
        assert may_go_on.wait(HANG_SECONDS)
        return write(snapshot, folder, keep)

    monkeypatch.setattr(background_module, "write", slow_write)
    writer = Writer(tmp_path, keep=2)
    assert writer.poll() is None
    snapshot = tiny_snapshot(1)
    writer.submit(snapshot)
    time.sleep(0.2)
    assert writer.poll() is None
    assert find_newest(tmp_path) is None
    assert writer.blocking_seconds == snapshot.seconds > 0
    may_go_on.set()
    assert writer.wait() == writer.finished_step == 1
    assert writer.wait() is writer.poll() is None
    assert verify(tmp_path / "step-00000001").step == 1
    assert writer.background_seconds >= 0.2


def test_at_most_one_write_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = []
    most = 0

    def watched_write(snapshot: Snapshot, folder: Path, keep: int) -> Path:
        nonlocal most
        running.append(snapshot.step)
        most = max(most, len(running))
        time.sleep(0.1)
        running.remove(snapshot.step)
        return write(snapshot, folder, keep)

    monkeypatch.setattr(background_module, "write", watched_write)
    writer = Writer(tmp_path, keep=3)
    snapshots = [tiny_snapshot(step) for step in (1, 2, 3)]
    for number, snapshot in enumerate(snapshots):
        writer.submit(snapshot)
        assert writer.finished_step == (number or None)  # the one before was waited for
    assert writer.blocking_seconds > sum(snapshot.seconds for snapshot in snapshots)
    assert writer.wait() == 3
    assert most == 1
    assert len(names(tmp_path)) == 3


def test_a_fault_in_the_thread_is_raised_in_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writer = Writer(tmp_path / "file", keep=1)
    for look in (writer.wait, lambda: writer.submit(tiny_snapshot(2))):
        writer.submit(tiny_snapshot(1))
        with pytest.raises(StorageError):
            look()
    assert writer.finished_step is None
    writer.submit(tiny_snapshot(3))
    assert writer.pending is not None and writer.pending.exception(HANG_SECONDS) is not None
    with pytest.raises(StorageError):
        writer.poll()


def test_short_memory_writes_on_the_spot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tiny_snapshot(1)
    memory = SimpleNamespace(available=2 * snapshot.num_bytes - 1)
    monkeypatch.setattr(background_module.psutil, "virtual_memory", lambda: memory)
    writer = Writer(tmp_path, keep=1)
    writer.submit(snapshot)
    assert writer.pending is None
    assert writer.finished_step == 1
    assert writer.blocking_seconds > snapshot.seconds
    assert verify(tmp_path / "step-00000001").step == 1
