"""What is to be seen on a GPU, a function each: what is looked at, what is expected, what is seen, whether that holds.

Each is called in a process of its own, since an error on a device ends all that a process does there. `Machine` says
where: on a CPU the same code runs in small sizes, which shows that it runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from open_clip import ClipLoss
from torch import Tensor
from trainers import SMALL, OpenClip, Ours, Scenario, make_batch, new_model, part_of

from accel_clip import LOSSES, CheckpointConfig, Config, DataConfig, LossConfig, ModelConfig, TrackConfig, TrainConfig
from accel_clip.checkpoint.background import Writer
from accel_clip.checkpoint.snapshot import take_snapshot
from accel_clip.data.batch import Batch
from accel_clip.faults import NonFiniteError
from accel_clip.losses.tiles import OneProcess, softmax_share
from accel_clip.models.blocks import compile_blocks
from accel_clip.process.accelerator import allow_tf32, choose_precision, process_as_found
from accel_clip.run.folder import RunFolder
from accel_clip.run.preconditions import prepare
from accel_clip.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """Where the checks run."""

    device: str
    """cuda, or cpu for a trial of the checks themselves"""

    @property
    def is_real(self) -> bool:
        """Return whether there is a GPU, so that figures mean something."""
        return self.device != "cpu"

    @property
    def precision(self) -> str:
        """Return the mixed precision that a run takes here."""
        return choose_precision("auto", {}) if self.is_real else "no"

    def pairs(self, number: int) -> int:
        """Return so many pairs, few on a CPU."""
        return number if self.is_real else min(number, 16)

    def tower(self, name: str) -> str:
        """Return a model's name, the smallest one on a CPU."""
        return name if self.is_real else "tiny"

    def wait(self) -> None:
        """Wait until the device has done what it was told."""
        if self.is_real:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Seen:
    """One row of the table."""

    what: str
    """what was looked at"""
    expected: str
    """what it should be"""
    seen: str
    """what it was"""
    holds: bool | None
    """whether that is as expected, None for a figure without a promise"""


Rows = Iterator[Seen]


def machine(on: Machine) -> Rows:
    """What this machine is."""
    yield Seen("torch, CUDA", "", f"{torch.__version__}, {torch.version.cuda}", None)
    if not on.is_real:
        yield Seen("GPU", "one", "none: small sizes on the CPU", None)
        return
    properties = torch.cuda.get_device_properties(0)
    capability = properties.major * 10 + properties.minor
    yield Seen("GPU", "one that the wheel supports", f"{properties.name}, sm_{capability}", True)
    yield Seen("cuDNN, NCCL", "", f"{torch.backends.cudnn.version()}, {torch.cuda.nccl.version()}", None)
    yield Seen("free memory", "", f"{torch.cuda.mem_get_info()[0] / GIB:.1f} GiB", None)
    expected = "bf16" if capability >= 80 else "fp16"
    yield Seen("precision of auto", expected, on.precision, on.precision == expected)
    allow_tf32()
    try:
        seen = torch.get_float32_matmul_precision()
    except RuntimeError as error:
        seen = str(error).partition("\n")[0][:80]
    yield Seen("reading the old TF32 flag", "high", seen, seen == "high")


def demo(on: Machine) -> Rows:
    """Whether the demo learns what it learns on a CPU."""
    for precision in ("auto", "no"):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            length = [] if on.is_real else ["--train.steps", "2"]
            done = launch(["--output_dir", f"{folder}/run", "--train.precision", precision, *length])
            seconds = time.perf_counter() - begin
            if done.returncode:
                yield Seen(f"demo, precision {precision}", "exit 0", f"exit {done.returncode}: {end_of(done)}", False)
                continue
            metrics = json.loads((Path(folder) / "run/export/metrics.json").read_text())
        recalls = [metrics[f"val/{way}_R@1"] for way in ("text_to_image", "image_to_text")]
        expected = (0.938, 0.926) if on.is_real else (0.0, 0.0)
        holds = all(seen >= least - 0.03 for seen, least in zip(recalls, expected, strict=True))
        seen = f"{recalls[0]:.3f}, {recalls[1]:.3f} in {seconds:.0f} s"
        yield Seen(f"demo, precision {precision}: R@1 both ways", "within 0.03 of 0.938, 0.926", seen, holds)


def gradients(on: Machine) -> Rows:
    """How far the gradients of a step are from those of the dense loss in float64 on the CPU."""
    scenario = Scenario("", SMALL, batch_size=96, micro_batch_size=24, device=on.device)
    batch = make_batch(new_model(scenario), 96, None)
    reference = dense_gradients(scenario, batch)
    kinds = [("float32", "no", False, 1e-5), ("TF32", "no", True, 1e-2), ("bf16", "bf16", True, 3e-2)]
    for name, precision, is_rounded, limit in kinds if on.is_real else kinds[:1]:
        with process_as_found():
            torch.backends.cudnn.conv.fp32_precision = "ieee"
            if is_rounded:
                allow_tf32()
            seen = difference(step_gradients(replace(scenario, precision=precision), batch), reference)
        yield Seen(f"all gradients, {name}, against float64", f"< {limit:g}", f"{seen:.1e}", seen < limit)


def plans(on: Machine) -> Rows:
    """Whether a batch may be cut in any way."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    dropping = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "patch_dropout": 0.5}}
    for name, towers, cuts in (("", SMALL, (96, 48, 12)), (", patches dropped", dropping, (12,))):
        found = []
        for rows in cuts:
            for kept in (None, 0.0, 0.01):
                cut = Scenario("", towers, 96, rows, kept, device=on.device)
                found.append(step_gradients(cut, make_batch(new_model(cut), 96, None)))
        seen = max(difference(each, found[0]) for each in found[1:])
        yield Seen(f"gradients of {len(found)} plans{name}", "< 1e-5", f"{seen:.1e}", seen < 1e-5)


def loss(on: Machine) -> Rows:
    """Whether the loss in tiles is the dense one, also where towers are rounded to TF32."""
    for number in (300, 5000):
        generator = torch.Generator().manual_seed(number)
        features = [torch.randn(number, 512, generator=generator, dtype=torch.float64) for _ in range(2)]
        image, text = (torch.nn.functional.normalize(each, dim=-1).to(on.device).requires_grad_() for each in features)
        scale = torch.tensor(50.0, dtype=torch.float64, device=on.device)
        value = ClipLoss()(image, text, scale)
        value.backward()
        with process_as_found():
            allow_tf32()
            share = softmax_share(OneProcess(), image.detach().float(), text.detach().float(), scale.float())
        parts = [(share.by_image_features, image.grad), (share.by_text_features, text.grad)]
        seen = max(difference([ours], [theirs]) for ours, theirs in parts)
        off = abs(share.loss.item() - value.item()) / value.item()
        yield Seen(
            f"loss of {number} pairs and its gradient", "< 1e-6", f"{off:.1e}, {seen:.1e}", max(off, seen) < 1e-6
        )


def waits(on: Machine) -> Rows:
    """How often a step waits for the device, and where."""
    cuts = (("one chunk a side", 256, None), ("4 chunks a side, run twice", 64, 0.0))
    for name, rows, kept in cuts:
        batch, ours = ready(on, Scenario("", SMALL, 256, rows, kept, device=on.device, precision=on.precision))
        places = waits_of(lambda ours=ours, batch=batch: ours.contrastive_step(batch)) if on.is_real else Counter()
        shown = "; ".join(f"{count} × {place}" for place, count in places.most_common(8))
        total = sum(places.values())
        yield Seen(f"waits in a contrastive step, {name}", "0", f"{total}: {shown}"[:600], total == 0)


def profile(on: Machine) -> Rows:
    """How busy the GPU is, what is copied to it, and how many kernels a step takes."""
    number = on.pairs(1024)
    batch, ours = ready(on, standard(on, number))
    step, kinds = ours.on(batch), [torch.profiler.ProfilerActivity.CPU]
    for _ in range(3):
        step()
    on.wait()
    if on.is_real:
        kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        begin = time.perf_counter()
        for _ in range(8):
            step()
        on.wait()
        seconds = time.perf_counter() - begin
    events = [each for each in profiler.events() if each.device_type != torch.autograd.DeviceType.CPU]
    busy = covered([(each.time_range.start, each.time_range.end) for each in events]) / 1e6 / seconds
    copies = Counter(each.name for each in events if "HtoD" in each.name)
    pageable = sum(count for name, count in copies.items() if "Pageable" in name) / 8
    pinned = sum(count for name, count in copies.items() if "Pinned" in name) / 8
    kernels = sum("Mem" not in each.name for each in events) / 8
    yield Seen(f"GPU busy, ViT-B-32, {number} pairs", "> 0.9", f"{busy:.2f}", busy > 0.9 if on.is_real else None)
    yield Seen(
        "copies to the device a step", "pinned alone", f"{pinned:g} pinned, {pageable:g} pageable", pageable == 0
    )
    yield Seen("kernels a step", "", f"{kernels:.0f}", None)


def shapes(on: Machine) -> Rows:
    """What new shapes of captions cost, with and without the attention of cuDNN."""
    number = on.pairs(256)
    scenario = standard(on, number)
    batch, ours = ready(on, scenario)
    fresh = [replace(batch, tokens=make_batch(new_model(scenario), number, None, seed).tokens) for seed in range(1, 13)]
    found = {}
    for is_on in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(is_on)
        repeated, new = ours.on(batch), [ours.on(each) for each in fresh]
        for _ in range(3):
            repeated()
        found[is_on] = median(timed(on, step) for step in new), median(timed(on, repeated) for _ in range(12))
    for is_on, (new, old) in found.items():
        name = "with" if is_on else "without"
        seen = f"{1000 * new:.0f} ms against {1000 * old:.0f} ms: {new / old:.2f}"
        yield Seen(f"a step of new shapes, {name} cuDNN's attention", "" if is_on else "ratio < 1.1", seen,
                   None if is_on or not on.is_real else new / old < 1.1)  # fmt: skip


def memory(on: Machine) -> Rows:
    """Whether a batch is cut so that it fits, also where something else holds most of the memory."""
    number = on.pairs(4096)
    blocker = None
    if on.is_real:
        blocker = torch.empty(torch.cuda.mem_get_info()[0] - 12 * GIB, dtype=torch.uint8, device=on.device)
    batch, ours = ready(on, replace(standard(on, number), micro_batch_size=None))
    if on.is_real:
        torch.cuda.reset_peak_memory_stats()
    step = ours.on(batch)
    for _ in range(3):
        step()
    on.wait()
    plan = ours.contrastive_step.plan
    cut = f"{plan.micro_batch_size} rows, kept {plan.kept}"
    if not on.is_real:
        yield Seen(f"plan of {number} pairs", "", cut, None)
        return
    retries = torch.cuda.memory_stats()["num_alloc_retries"]
    peak = torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    seen, holds = f"{cut}, {retries} retries, {peak:.2f}", retries == 0 and peak <= 0.98
    yield Seen(f"{number} pairs of ViT-B-32 in 12 GiB", "no retries, peak <= 0.98", seen, holds)
    del blocker


def resume(on: Machine) -> Rows:
    """Whether a run that was killed goes on as the one that was not."""
    with tempfile.TemporaryDirectory() as folder:
        asked = ["--train.steps", "30", "--checkpoint.every", "10", "--track.every", "1", "--track.to", "[]"]
        asked += ["--train.precision", "no", "--data.workers", "2", "--train.batch_size", "64"]
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        launch(["--output_dir", str(whole), *asked])
        first = launch(["--output_dir", str(killed), *asked], ACCEL_CLIP_FAULT="step:25")
        again = launch(["--output_dir", str(killed), *asked])
        if again.returncode:
            yield Seen("a killed run", "goes on", f"{first.returncode}, {again.returncode}: {end_of(again)}", False)
            return
        ours, theirs = (losses_of(each) for each in (killed, whole))
        same = (killed / "export/open_clip_model.safetensors").read_bytes() == (
            whole / "export/open_clip_model.safetensors"
        ).read_bytes()
    off = max(abs(ours[step] - theirs[step]) / theirs[step] for step in theirs)
    cut = "cut in another way" in again.stdout + again.stderr
    told = ", cut in another way" if cut else ""
    seen = f"{first.returncode}; {off:.1e}{told}; export {'same' if same else 'other'} bytes"
    yield Seen("losses of a killed run, float32", "< 1e-6, cut as before", seen, off < 1e-6 and not cut)


def half(on: Machine) -> Rows:
    """What fp16 does with overflows, and with a loss that is not finite."""
    if not on.is_real:
        yield Seen("fp16", "", "needs a GPU", None)
        return
    calls = []

    @LOSSES.register("not_a_number_once")
    def not_a_number_once(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, output_dict: bool = True):
        """A loss that is NaN in one step."""
        calls.extend([1] * image_features.requires_grad)  # an evaluation does not count
        value = ClipLoss()(image_features, text_features, logit_scale)
        return {"contrastive_loss": value * (float("nan") if len(calls) == NAN_CALL else 1)}

    for policy, name in (("stop", "clip"), ("stop", NAN), ("skip", NAN), ("rollback", NAN)):
        calls.clear()
        seen = outcome_of_half(policy, name)
        expected = "NonFiniteError" if (policy, name) == ("stop", NAN) else "12 steps"
        yield Seen(f"fp16, first scale 2**24, loss {name}, {policy}", expected, seen, seen.startswith(expected))


NAN, NAN_CALL = "not_a_number_once", 8  # the first call is that of a trial


def outcome_of_half(policy: str, loss_name: str) -> str:
    """Return how 12 steps in fp16 end."""
    with tempfile.TemporaryDirectory() as folder, process_as_found():
        config = small_run(folder, TrainConfig(steps=12, batch_size=64, precision="fp16", non_finite=policy))
        config = replace(config, loss=LossConfig(loss_name))
        trainer = Trainer(prepare(config), RunFolder(config.output_dir))
        trainer.accelerator.scaler._init_scale = 2.0**24
        try:
            steps = trainer.run().num_steps
        except NonFiniteError as error:
            return f"NonFiniteError: {str(error)[:60]}"
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:120]}"
        optimizer = trainer.learner.optimizer.optimizer
        taken = max(float(state.get("step", 0)) for state in optimizer.state.values())
        return f"{steps} steps, {taken:.0f} taken, scale {trainer.accelerator.scaler.get_scale():g}"


def compiled(on: Machine) -> Rows:
    """What compiled blocks are worth."""
    if not on.is_real:
        yield Seen("compile", "", "needs a GPU", None)
        return
    scenario = standard(on, on.pairs(256))
    seconds, losses = {}, {}
    for name in ("off", "on"):
        model = new_model(scenario)
        if name == "on":
            compile_blocks(model.clip, torch.device(on.device))
        ours = Ours(model, scenario)
        batches = [make_batch(model, scenario.batch_size, None, seed).pin_memory() for seed in range(10)]
        begin = time.perf_counter()
        losses[name] = [ours.on(each)() for each in batches]
        on.wait()
        start = time.perf_counter() - begin
        seconds[name] = start, median(timed(on, ours.on(each)) for each in batches)
    stops = sum(count for key, count in torch._dynamo.utils.counters["unimplemented"].items() if "limit" in str(key))
    off = abs(losses["on"][0] - losses["off"][0]) / losses["off"][0]
    ratio = seconds["on"][1] / seconds["off"][1]
    seen = f"ratio {ratio:.2f}, first ten steps {seconds['on'][0]:.0f} s, loss off by {off:.1e}, {stops} limits"
    yield Seen("a step with compiled blocks", "< 1, loss within 1e-3", seen, ratio < 1 and off < 1e-3)


def losses(on: Machine) -> Rows:
    """Whether every kind of run takes a few steps."""
    start = small_run("", TrainConfig(steps=5, batch_size=32))
    with tempfile.TemporaryDirectory() as folder:
        teacher = {"name": f"local-dir:{folder}/siglip/export"}
        still = replace(start.data, augmentation="none")
        runs = {
            "siglip": replace(start, loss=LossConfig("siglip")),
            "positives": replace(start, loss=LossConfig("clip", {"duplicates": "positives"})),
            "masked": replace(start, loss=LossConfig("clip", {"duplicates": "masked"})),
            "distill": replace(start, loss=LossConfig("distill", {"teachers": [teacher]})),
            "cached features": replace(start, data=still, model=ModelConfig(freeze=["image"]),
                                       train=replace(start.train, cache_features=True)),
            "coca": replace(start, model=ModelConfig("coca_ViT-B-32"), loss=LossConfig("coca")),
            "ResNet": replace(start, model=ModelConfig("RN50")),
            "timm": replace(start, model=ModelConfig("ViT-B-16-SigLIP"), loss=LossConfig("siglip")),
        }  # fmt: skip
        chosen = runs if on.is_real else {"siglip": runs["siglip"]}
        for name, config in chosen.items():
            place = f"{folder}/{name.replace(' ', '_')}"
            yield Seen(f"5 steps: {name}", "finite", *outcome_of(replace(config, output_dir=place)))


def outcome_of(config: Config) -> tuple[str, bool]:
    """Return how a run ends, and whether that is well."""
    with process_as_found():
        try:
            result = Trainer(prepare(config), RunFolder(config.output_dir)).run()
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:150]}", False
    return f"{result.num_steps} steps", True


def checkpoints(on: Machine) -> Rows:
    """What a checkpoint costs the training."""
    batch, ours = ready(on, standard(on, on.pairs(1024)))
    step = ours.on(batch)
    for _ in range(3):
        step()
    before = median(timed(on, step) for _ in range(6))
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder), 3)
        on.wait()
        begin = time.perf_counter()
        state: dict[str, Any] = {}
        writer.submit(take_snapshot(1, ours.clip, ours.optimizer.optimizer, [], state))
        blocking = time.perf_counter() - begin
        beside = [timed(on, step) for _ in range(6)]
        writer.wait()
    share = before / median(beside)
    yield Seen("a checkpoint of ViT-B-32", "blocks < 2 s", f"{blocking:.2f} s", blocking < 2)
    yield Seen("rate of steps while it is written", "> 0.95", f"{share:.2f}", share > 0.95 if on.is_real else None)


def speed(on: Machine) -> Rows:
    """Steps of ours and of open_clip_train from the same weights on the same pairs, interleaved."""
    cases = [("ViT-B-32", 256, 256), ("ViT-B-32", 1024, 1024), ("ViT-B-32", 4096, 1024), ("ViT-L-14", 256, 128)]
    for name, number, rows in cases if on.is_real else cases[:1]:
        scenario = replace(standard(on, on.pairs(number)), name=on.tower(name), micro_batch_size=on.pairs(rows))
        model = new_model(scenario)
        batch = make_batch(model, scenario.batch_size, None).pin_memory() if on.is_real else make_batch(model, 16, None)
        sides = {"ours": Ours(model, scenario).on(batch)}
        sides["open_clip"] = OpenClip(new_model(scenario), scenario).on(batch)
        for step in sides.values():
            for _ in range(2):
                step()
        number_of_runs = 8 if on.is_real else 1
        found: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(number_of_runs):
            for side, step in sides.items():
                found[side].append(timed(on, step))
        ours, theirs = (median(found[side]) for side in ("ours", "open_clip"))
        seen = f"{1000 * ours:.0f} ms, open_clip {1000 * theirs:.0f} ms: {ours / theirs:.3f}"
        yield Seen(f"a step: {name}, {number} pairs, chunks of {rows}, {on.precision}", "", seen, None)


def loss_speed(on: Machine) -> Rows:
    """The loss alone, in tiles against open_clip's."""
    for number in (256, 1024, 4096, 8192, 16384, 32768) if on.is_real else (64,):
        image, text = (torch.nn.functional.normalize(torch.randn(number, 512, device=on.device), dim=-1) for _ in "ab")
        scale = torch.tensor(50.0, device=on.device)

        def ours(image=image, text=text, scale=scale) -> None:
            softmax_share(OneProcess(), image, text, scale)

        def theirs(image=image, text=text, scale=scale) -> None:
            ClipLoss()(image.requires_grad_(), text.requires_grad_(), scale).backward()

        seconds = []
        for each in (ours, theirs):
            each()
            seconds.append(median(timed(on, each) for _ in range(5)))
        seen = f"{1000 * seconds[0]:.1f} ms, open_clip {1000 * seconds[1]:.1f} ms: {seconds[0] / seconds[1]:.2f}"
        yield Seen(f"the loss of {number} pairs, float32", "", seen, None)


def processes(on: Machine) -> Rows:
    """Several GPUs."""
    number = torch.cuda.device_count() if on.is_real else 0
    yield Seen("two processes on two GPUs", "as one", f"not run: {number} GPU(s) here", None)


CHECKS: dict[str, Callable[[Machine], Rows]] = {
    each.__name__: each
    for each in (
        machine, gradients, plans, loss, waits, demo, resume, half, losses, memory, checkpoints, profile, shapes,
        loss_speed, speed, compiled, processes,
    )
}  # fmt: skip
"""By name, what is right before what is fast."""


def standard(on: Machine, number: int) -> Scenario:
    """Return what most figures are taken of: ViT-B-32 in the precision that a run takes, in one chunk."""
    name, rows = on.tower("ViT-B-32"), number
    return Scenario("", batch_size=number, micro_batch_size=rows, device=on.device, precision=on.precision, name=name)


def ready(on: Machine, scenario: Scenario) -> tuple[Batch, Ours]:
    """Return a batch as a loader hands it over, and our trainer after one step."""
    model = new_model(scenario)
    batch = make_batch(model, scenario.batch_size, None)
    ours = Ours(model, scenario)
    batch = batch.pin_memory() if on.is_real else batch
    ours.on(part_of(batch, 16))()
    return batch, ours


def dense_gradients(scenario: Scenario, batch: Batch) -> list[Tensor]:
    """Return the gradients of open_clip's loss over the whole batch, float64 on the CPU."""
    model = new_model(scenario)
    clip = model.clip.double()
    mean, std = (torch.tensor(model.preprocess_config[key]).view(1, 3, 1, 1).double() for key in ("mean", "std"))
    outputs = clip(image=(batch.image.double() / 255 - mean) / std, text=batch.tokens)
    ClipLoss()(outputs["image_features"], outputs["text_features"], outputs["logit_scale"]).backward()
    return [each.grad for each in clip.parameters()]


def step_gradients(scenario: Scenario, batch: Batch) -> list[Tensor]:
    """Return the gradients that our step leaves in the parameters."""
    ours = Ours(new_model(scenario), scenario)
    torch.manual_seed(1)
    ours.add_gradient(batch)
    return [each.grad for each in ours.clip.parameters()]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the norm of a difference by the norm of the second."""
    one, other = (torch.cat([each.detach().double().cpu().flatten() for each in side]) for side in (ours, theirs))
    return float((one - other).norm() / other.norm())


def waits_of(action: Callable[[], object]) -> Counter[str]:
    """Return how often an action waits for the GPU, by the line that does."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            action()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message).lower()
    )


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of spans."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def timed(on: Machine, action: Callable[[], object]) -> float:
    """Return the seconds of an action until the device has done it."""
    on.wait()
    begin = time.perf_counter()
    action()
    on.wait()
    return time.perf_counter() - begin


def small_run(folder: str, train: TrainConfig) -> Config:
    """Return settings of a short run on the demo."""
    return Config(
        output_dir=f"{folder}/run",
        data=DataConfig(train=["demo"], workers=2),
        train=train,
        track=TrackConfig(to=[], every=1),
        checkpoint=CheckpointConfig(),
    )


def launch(asked: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the training command to its end."""
    command = [sys.executable, "train.py", *asked]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def end_of(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line that a command has said."""
    lines = (done.stderr + done.stdout).strip().splitlines()
    return lines[-1][:200] if lines else "nothing said"


def losses_of(run: Path) -> dict[int, float]:
    """Return the loss of every step of a run."""
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {point["step"]: point["loss"] for point in points if point.get("loss") is not None}
