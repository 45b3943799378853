"""Real launches: two processes train the model that one trains; launches that do not fit are repaired or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import CPU_2, launch, small_model, train_py
from safetensors.torch import load_file

from accel_clip.processes import choose_precision

PLUGIN = '''
import open_clip
import torch
from accel_clip import LOSSES

LOSSES.register("theirs")(open_clip.ClipLoss)


@LOSSES.register("mine")
def mine(image_features, text_features, logit_scale, output_dict=True):
    """A margin over the hardest caption of the batch, which only a gathered batch shows."""
    logits = logit_scale * image_features @ text_features.T
    own = logits.diagonal()
    hardest = (logits - 1e4 * torch.eye(len(logits))).logsumexp(dim=1)
    pull = ((image_features - text_features) ** 2).sum(1).mean()
    return {"margin_loss": torch.relu(hardest - own + 1).mean(), "pull_loss": pull}
'''
FIVE_STEPS = ("--train.steps", "5", "--train.batch_size", "16", "--optim.name", "sgd", "--optim.lr", "0.05")
QUIET = (
    "--track.to",
    "[]",
    "--track.every",
    "1",
    "--data.workers",
    "0",
    "--data.val",
    "null",
    "--data.val_fraction",
    "0",
)


def words_for(folder: Path, loss: str, output: str) -> list[str]:
    (folder / "plugin.py").write_text(PLUGIN)
    model = ["--model.name", small_model(folder), "--plugins", "plugin.py"]
    return [*model, "--loss.name", loss, "--output_dir", output, *FIVE_STEPS, *QUIET]


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in line]


RECOMPUTED = ("--train.micro_batch_size", "3", "--train.activation_gib", "0")
PARTLY_KEPT = ("--train.micro_batch_size", "2", "--train.activation_gib", "0.0005", "--train.accumulate", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "cut", "both"),
    [
        ("clip", (), ()),
        ("siglip", RECOMPUTED, ()),
        ("theirs", (), ()),
        ("mine", RECOMPUTED, ()),
        ("clip", PARTLY_KEPT[:4], ("--model.freeze", "text")),
        ("clip", PARTLY_KEPT[:4], PARTLY_KEPT[4:]),
    ],
)
def test_two_processes_train_the_model_that_one_trains(
    tmp_path: Path, loss: str, cut: tuple[str, ...], both: tuple[str, ...]
) -> None:
    one = train_py(*words_for(tmp_path, loss, "one"), *both, folder=tmp_path)
    two = launch(*words_for(tmp_path, loss, "two"), *cut, *both, folder=tmp_path, launcher=CPU_2)
    assert (one.code, two.code) == (0, 0), one.err + two.err
    weights = [load_file(tmp_path / name / "export" / "open_clip_model.safetensors") for name in ("one", "two")]
    start = train_py(*words_for(tmp_path, loss, "start"), *both, "--optim.lr", "1e-30", folder=tmp_path)
    assert start.code == 0, start.err
    before = load_file(tmp_path / "start" / "export" / "open_clip_model.safetensors")
    assert "logit_scale" in weights[0]
    for name, expected in weights[0].items():
        difference = (weights[1][name] - expected).abs().max() / expected.abs().max().clamp_min(1e-12)  # zero biases
        assert difference <= 1e-5, f"{name}: {difference}"
    moved = {name: (expected - before[name]).abs().max().item() for name, expected in weights[0].items()}
    trained = [name for name in ("logit_scale", "visual.proj", "text_projection") if moved[name] > 1e-4]
    assert len(trained) == (2 if "text" in both else 3), moved
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)


def test_one_process_where_several_were_asked_for_is_refused(tmp_path: Path) -> None:
    words = ["--output_dir", "run", *QUIET]
    done = launch(*words, folder=tmp_path, launcher=("--cpu", "--num_processes", "2"))
    assert done.code != 0 and "accelerate_configs/cpu_2.yaml" in done.err
    assert not (tmp_path / "run").exists()
    direct = train_py(*words, folder=tmp_path, MASTER_PORT="29500")
    assert direct.code == 2 and "accelerate_configs/cpu_2.yaml" in direct.err
    assert len(direct.err.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the launch is right where there is a GPU")
def test_multi_gpu_without_a_gpu_meets_on_the_cpu(tmp_path: Path) -> None:
    launcher = ("--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    done = launch(*words_for(tmp_path, "clip", "run"), folder=tmp_path, launcher=launcher)
    assert done.code == 0, done.err
    assert "training on 2 process(es)" in done.err
    assert len(losses_of(tmp_path / "run")) == 5  # one folder, written by one training


@pytest.mark.slow
def test_errors_in_two_processes_are_said_once(tmp_path: Path) -> None:
    done = launch("--optim.name", "adamv", "--output_dir", "run", folder=tmp_path, launcher=CPU_2)
    assert done.code != 0
    assert done.err.count("accel-clip: error:") == 1 and "unknown optimizer 'adamv'" in done.err
    uneven = launch("--train.batch_size", "7", "--output_dir", "run", folder=tmp_path, launcher=CPU_2)
    assert "train.batch_size: 7 cannot be divided evenly over 2 processes" in uneven.err
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_find_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    from accel_clip.config import TrainConfig
    from accel_clip.faults import ConfigError
    from accel_clip.processes import build_accelerator

    class Alone(accelerate.Accelerator):
        num_processes = 1

    monkeypatch.setattr("accel_clip.processes.Accelerator", lambda **_: object.__new__(Alone))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="started 2 processes and this one sees 1"):
        build_accelerator(TrainConfig())


@pytest.mark.parametrize(
    ("setting", "launcher", "expected"),
    [
        ("auto", "no", "no"),
        ("auto", "bf16", None),
        ("auto", "fp8", None),
        ("bf16", "fp16", "bf16"),
        ("no", "bf16", "no"),
    ],
)
def test_the_setting_wins_over_the_launcher_and_its_no_counts_as_unset(
    setting: str, launcher: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_precision(setting, {"ACCELERATE_MIXED_PRECISION": launcher}) == expected


def test_emulated_bf16_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose_precision("auto", {}) == "fp16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_precision("auto", {}) == "bf16"
