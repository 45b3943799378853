"""Real launches: two processes train the model that one trains; launches that do not fit are repaired or refused."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accel_clip.config import ModelConfig
from accel_clip.faults import ConfigError
from accel_clip.models.build import build_model
from accel_clip.process.accelerator import allow_tf32, choose_precision, must_train_on_cpu, process_as_found
from accel_clip.randomness import derive_seed
from helpers.commands import CPU_2, launch, losses_of, train_py
from helpers.comparison import ADDITIONS_OF_A_STEP, EPSILON, rounding
from helpers.models import small_coca, small_model

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
NUM_STEPS = 5
TO_ROUNDING = rounding(NUM_STEPS * ADDITIONS_OF_A_STEP)
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
    model = small_coca(folder) if loss == "coca" else small_model(folder)
    options = ["--loss.options", teacher_of(folder)] if loss == "distill" else []
    words = ["--model.name", model, "--plugins", "plugin.py", "--loss.name", loss, *options]
    return [*words, "--output_dir", output, *FIVE_STEPS, *QUIET]


def teacher_of(folder: Path) -> str:
    """Write weights for a teacher and return the options of `distill`."""
    torch.manual_seed(9)
    teacher = build_model(ModelConfig(small_model(folder)))
    save_file(dict(teacher.clip.state_dict()), folder / "teacher.safetensors")
    return json.dumps({"teachers": {"name": small_model(folder), "pretrained": str(folder / "teacher.safetensors")}})


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
        ("coca", RECOMPUTED, ()),
        ("distill", PARTLY_KEPT[:4], ()),
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
    torch.manual_seed(derive_seed(0, "weights"))
    named = small_coca(tmp_path) if loss == "coca" else small_model(tmp_path)
    before = build_model(ModelConfig(named), needs_logit_bias=loss == "siglip").clip.state_dict()
    assert "logit_scale" in weights[0]
    moved = {}
    for name, expected in weights[0].items():
        moved[name] = (expected - before[name]).abs().max().item()
        allowed = TO_ROUNDING * moved[name] + NUM_STEPS * EPSILON * expected.abs().max()  # of gradients, and in storing
        assert (weights[1][name] - expected).abs().max() <= allowed, name
    names = ("logit_scale", "visual.proj", "text.text_projection" if loss == "coca" else "text_projection")
    trained = [name for name in names if moved[name] > 1e-4]
    assert len(trained) == (2 if "text" in both else 3), moved
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=TO_ROUNDING)


COUNTING = """
import torch.distributed as distributed
from collections import Counter

counts = Counter()
NAMES = ("all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "broadcast", "reduce_scatter",
         "all_gather_object", "broadcast_object_list", "barrier", "reduce")


def counting(name, original):
    def collective(*given, **named):
        counts[name] += 1
        return original(*given, **named)
    return collective


for name in NAMES:
    if hasattr(distributed, name):
        setattr(distributed, name, counting(name, getattr(distributed, name)))

from accel_clip.trainer import Trainer

original = Trainer.train_step


def train_step(self, session):
    counts.clear()
    original(self, session)
    if self.accelerator.is_main_process:
        with open("counts.txt", "a") as file:
            file.write(f"{dict(counts)}\\n")


Trainer.train_step = train_step
"""


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "num_gathers"), [("clip", 2), ("siglip", 1)])
def test_a_step_costs_few_collectives(tmp_path: Path, loss: str, num_gathers: int) -> None:
    """The reduction of gradients is DDP's own; beside it there are the loss's gathers and one agreement."""
    words = words_for(tmp_path, loss, "run")
    (tmp_path / "plugin.py").write_text(COUNTING)
    done = launch(*words, *RECOMPUTED, folder=tmp_path, launcher=CPU_2)
    assert done.code == 0, done.err
    steps = [ast.literal_eval(line) for line in (tmp_path / "counts.txt").read_text().splitlines()]
    assert len(steps) == 5
    for counts in steps:
        reductions = counts.pop("all_reduce")
        assert (sum(counts.values()), reductions) == (num_gathers, 1), counts


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_told_in_one_line_before_the_run_begins(tmp_path: Path) -> None:
    without = {"CXX": "/not/there/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = train_py(*words_for(tmp_path, "clip", "run"), "--train.compile", "true", folder=tmp_path, **without)
    assert done.code == 2, done.err
    assert "train.compile: torch.compile fails here: " in done.err and "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_compiled_blocks_train_the_same_model(tmp_path: Path) -> None:
    plain = train_py(*words_for(tmp_path, "clip", "plain"), *RECOMPUTED, folder=tmp_path)
    compiled = train_py(
        *words_for(tmp_path, "clip", "compiled"), *RECOMPUTED, "--train.compile", "true", folder=tmp_path
    )
    assert (plain.code, compiled.code) == (0, 0), compiled.err
    assert losses_of(tmp_path / "compiled") == pytest.approx(losses_of(tmp_path / "plain"), rel=TO_ROUNDING)
    weights = [load_file(tmp_path / name / "export" / "open_clip_model.safetensors") for name in ("plain", "compiled")]
    assert weights[0].keys() == weights[1].keys()


@pytest.mark.slow
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
    from accel_clip.process.accelerator import build_accelerator, process_as_found

    class Alone(accelerate.Accelerator):
        num_processes = 1

    monkeypatch.setattr("accel_clip.process.accelerator.Accelerator", lambda **_: object.__new__(Alone))
    place = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {"WORLD_SIZE": "2", **place}.items():
        monkeypatch.setenv(name, value)
    with process_as_found(), pytest.raises(ConfigError, match="started 2 processes and this one sees 1"):
        build_accelerator(TrainConfig())


@pytest.mark.parametrize(
    ("setting", "launcher", "expected"),
    [
        ("auto", "no", "no"),
        ("auto", "bf16", "bf16"),
        ("bf16", "fp16", "bf16"),
        ("no", "bf16", "no"),
    ],
)
def test_the_setting_wins_over_the_launcher_and_its_no_counts_as_unset(
    setting: str, launcher: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_precision(setting, {"ACCELERATE_MIXED_PRECISION": launcher}) == expected


def test_more_processes_than_gpus_are_refused_and_told_how_many_there_may_be() -> None:
    with pytest.raises(ConfigError, match=r"8 processes and 4 GPU\(s\).*--num_processes 4"):
        must_train_on_cpu({"LOCAL_WORLD_SIZE": "8"}, 4)
    assert must_train_on_cpu({"LOCAL_WORLD_SIZE": "8", "ACCELERATE_USE_CPU": "true"}, 4)
    assert must_train_on_cpu({"LOCAL_WORLD_SIZE": "2"}, 0)
    assert not must_train_on_cpu({"LOCAL_WORLD_SIZE": "4"}, 4)
    assert not must_train_on_cpu({}, 0) and not must_train_on_cpu({}, 1)


def test_the_precision_is_that_of_the_device_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_precision("auto", {}, on_cpu=True) == "no"
    for setting, launcher in (("fp16", "no"), ("auto", "fp16")):
        with pytest.raises(ConfigError, match="fp16 needs a GPU"):
            choose_precision(setting, {"ACCELERATE_MIXED_PRECISION": launcher}, on_cpu=True)


def test_older_readers_of_the_product_precision_are_answered() -> None:
    of_cpu = torch.backends.mkldnn.matmul.fp32_precision
    with process_as_found():
        allow_tf32()
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.mkldnn.matmul.fp32_precision == of_cpu
    assert torch.get_float32_matmul_precision() == "highest"


def test_emulated_bf16_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose_precision("auto", {}) == "fp16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_precision("auto", {}) == "bf16"
