"""One training step of accel_clip and of the released open_clip_train, from the same weights on the same pairs.

Both clip the gradient norm and take a step of the same fused AdamW, so that only the gradient differs in how it is had.
The other side is `open_clip_train.train.train_one_epoch` itself, called with an epoch of one step. Its pictures come
normalised, as its loader hands them over; ours are uint8 and normalised inside the step.
"""

from __future__ import annotations

import csv
import json
import random
import tempfile
from argparse import Namespace
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from open_clip.factory import create_loss
from open_clip_train.train import train_one_epoch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from accel_clip.config import LossConfig, ModelConfig, OptimConfig, TrainConfig
from accel_clip.data.batch import Batch
from accel_clip.losses.base import build_loss, total
from accel_clip.models.anatomy import examine
from accel_clip.models.build import ClipModel, build_model
from accel_clip.models.data_parallel import data_parallel
from accel_clip.models.freezing import freeze
from accel_clip.models.training_model import TrainingModel, clamp_logit_scale
from accel_clip.optim.optimizers import build_optimizer
from accel_clip.process.accelerator import forget_previous_accelerator
from accel_clip.step.contrastive import ContrastiveStep
from accel_clip.step.plan import ModelTrial, choose_plan

WORDS = ("a", "of", "the", "in", "on", "two", "red", "old", "small", "bird", "house", "tree", "flag", "boat", "clock")
LARGEST_NORM = 1.0
MEDIUM = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 256, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
}
SMALL = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 192, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 3},
}


@dataclass(frozen=True)
class Scenario:
    """What both sides train on, and how each cuts it.

    batch_size: pairs of one process; micro_batch_size: what goes through a tower at once, and open_clip's batch, of
    which `--accum-freq` make one step; activation_gib: what our graphs may hold, None for what the machine has, 0 to
    run every chunk twice; saves_tokens: captions are trimmed and equal ones encoded once; knows_features: those of our
    locked image tower come from a cache; name: a model of open_clip's in the place of `towers`.
    """

    label: str
    towers: dict[str, Any] = field(default_factory=lambda: MEDIUM)
    batch_size: int = 128
    micro_batch_size: int = 32
    activation_gib: float | None = None
    saves_tokens: bool = True
    locks_image: bool = False
    knows_features: bool = False
    loss: str = "clip"
    device: str = "cpu"
    precision: str = "no"
    name: str | None = None

    @property
    def open_clip_precision(self) -> str:
        """Return the precision by open_clip's names."""
        return {"no": "fp32", "bf16": "amp_bf16", "fp16": "amp"}[self.precision]


SCENARIOS = {
    "accumulate": [
        Scenario("accumulate, graphs kept as memory allows"),
        Scenario("accumulate, every chunk run twice", activation_gib=0),
    ],
    "plain": [Scenario("plain, no accumulation on either side", micro_batch_size=128)],
    "two_passes": [
        Scenario(f"two passes, {size // 32} chunks of 32", SMALL, size, activation_gib=0, saves_tokens=False)
        for size in (128, 512, 2048)
    ],
    "locked": [
        Scenario("image tower locked, accumulation", locks_image=True),
        Scenario("image tower locked, its features cached, accumulation", locks_image=True, knows_features=True),
    ],
}


class Ours:
    """The step of `accel_clip.step.learner`, without its loader and logs."""

    def __init__(self, model: ClipModel, scenario: Scenario) -> None:
        if scenario.locks_image:
            freeze(model.clip, "image")
        self.clip = model.clip
        forget_previous_accelerator()
        self.accelerator = Accelerator(cpu=scenario.device == "cpu", mixed_precision=scenario.precision)
        anatomy = examine(model.clip, model.tokenizer)
        if not scenario.saves_tokens:
            anatomy = replace(anatomy, trims=False, deduplicates=False)
        optimizer = make_optimizer(model.clip)
        parallel, self.optimizer = data_parallel(self.accelerator, TrainingModel(model), optimizer)
        self.wrapped = parallel.model
        self.trained = [parameter for parameter in model.clip.parameters() if parameter.requires_grad]
        config = TrainConfig(
            batch_size=scenario.batch_size * self.accelerator.num_processes,
            micro_batch_size=scenario.micro_batch_size,
            activation_gib=scenario.activation_gib,
        )
        plan = choose_plan(ModelTrial(parallel, model, anatomy, self.optimizer), config)
        loss = build_loss(LossConfig(scenario.loss))
        self.contrastive_step = ContrastiveStep(parallel, loss, anatomy, plan)
        self.knows_features = scenario.knows_features

    def on(self, batch: Batch) -> Callable[[], float]:
        """Return what takes one optimizer step on a batch and returns the loss."""
        known = self.with_features(batch) if self.knows_features else batch

        def step() -> float:
            loss = self.add_gradient(known)
            self.accelerator.clip_grad_norm_(self.trained, LARGEST_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            clamp_logit_scale(self.clip, 100)
            return loss

        return step

    def with_features(self, batch: Batch) -> Batch:
        """Return a batch as the loader gives it where the features of its pictures are cached."""
        self.wrapped.train()
        with torch.no_grad():
            features = self.wrapped(image=batch.image)["image_features"]
        return replace(batch, image=batch.image[:, :, :0, :0], features={"image_features": features})

    def add_gradient(self, batch: Batch) -> float:
        """Add the gradient of a batch to the parameters and return its loss."""
        self.wrapped.train()
        return total(self.contrastive_step(batch)).item()


class OpenClip:
    """`train_one_epoch` of the released open_clip_train, on an epoch of one step."""

    def __init__(self, model: ClipModel, scenario: Scenario, rank: int = 0, num_processes: int = 1) -> None:
        self.clip, self.preprocess = model.clip.to(scenario.device), model.preprocess_config
        self.micro_batch_size = scenario.micro_batch_size
        if scenario.locks_image:
            self.clip.lock_image_tower()
        self.model = self.clip if num_processes == 1 else DistributedDataParallel(self.clip)
        self.optimizer = make_optimizer(self.clip)
        self.settings = open_clip_settings(scenario, rank, num_processes)
        self.loss = create_loss(self.settings)

    def on(self, batch: Batch) -> Callable[[], float]:
        """Return what takes one optimizer step on a batch and returns the loss."""
        pictures, tokens = normalised(batch.image, self.preprocess), batch.tokens
        if self.settings.device != "cpu":
            pictures, tokens = pictures.pin_memory(), tokens.pin_memory()
        epoch = Epoch(zip(*(each.split(self.micro_batch_size) for each in (pictures, tokens)), strict=True))
        settings = Namespace(**{**vars(self.settings), "accum_freq": len(epoch)})

        def step() -> float:
            log = Log()
            data = {"train": SimpleNamespace(dataloader=epoch, set_epoch=lambda number: None)}
            train_one_epoch(self.model, data, self.loss, 0, self.optimizer, None, None, None, settings, log)
            return log.get("train/loss", float("nan"))

        return step


class Epoch(list[tuple[Tensor, Tensor]]):
    """The micro-batches of one step, with what open_clip asks of a loader."""

    @property
    def num_batches(self) -> int:
        """The micro-batches."""
        return len(self)

    @property
    def num_samples(self) -> int:
        """The pairs."""
        return sum(len(pictures) for pictures, _ in self)


class Log(dict[str, float]):
    """Takes what open_clip writes to TensorBoard."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Remember the last value."""
        self[name] = value


def open_clip_settings(scenario: Scenario, rank: int, num_processes: int) -> Namespace:
    """Return open_clip's arguments; between processes the loss is the one that it advises for large batches."""
    return Namespace(
        model="",
        device=scenario.device,
        precision=scenario.open_clip_precision,
        batch_size=scenario.micro_batch_size,
        grad_clip_norm=LARGEST_NORM,
        siglip=scenario.loss == "siglip",
        loss_dist_impl=None,
        local_loss=num_processes > 1,
        gather_with_grad=num_processes > 1,
        distill=False,
        horovod=False,
        skip_scheduler=True,
        wandb=False,
        log_every_n_steps=1,
        rank=rank,
        world_size=num_processes,
    )


def both_sides(scenario: Scenario, rank: int = 0, num_processes: int = 1) -> tuple[Ours, OpenClip, ClipModel]:
    """Return the two trainers with equal weights, and a model for its tokenizer and picture size."""
    model = new_model(scenario)
    theirs = OpenClip(replace(model, clip=deepcopy(model.clip)), scenario, rank, num_processes)
    return Ours(model, scenario), theirs, model


def new_model(scenario: Scenario) -> ClipModel:
    """Return a scenario's model, with the same weights every time."""
    torch.manual_seed(0)
    if scenario.name is not None:
        return build_model(ModelConfig(scenario.name), needs_logit_bias=scenario.loss == "siglip")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"towers_{scenario.towers['vision_cfg']['width']}.json"
        file.write_text(json.dumps(scenario.towers), encoding="utf-8")
        return build_model(ModelConfig(str(file)), needs_logit_bias=scenario.loss == "siglip")


def make_optimizer(clip: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the AdamW that both sides use."""
    return build_optimizer(clip.named_parameters(), OptimConfig(lr=1e-4))


def make_batch(model: ClipModel, num_pairs: int, table: Path | None, seed: int = 0) -> Batch:
    """Return noise as pictures with captions of a table, or made-up ones."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (num_pairs, 3, *model.picture_size), generator=generator, dtype=torch.uint8)
    draw = random.Random(seed)
    captions = made_up_captions(num_pairs, draw) if table is None else captions_of(table, num_pairs, draw)
    numbers = torch.arange(num_pairs)
    return Batch(image, model.tokenizer(captions), numbers, numbers, numbers)


def normalised(pictures: Tensor, preprocess: dict[str, Any]) -> Tensor:
    """Return uint8 pictures [B, 3, H, W] as the float ones that a model with this preprocessing was made for."""
    mean, std = (torch.tensor(preprocess[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (pictures / 255 - mean) / std


def captions_of(table: Path, number: int, draw: random.Random) -> list[str]:
    """Return so many captions of a CSV file with a column `caption` or `title`, each row once while there are rows."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = [row.get("caption") or row["title"] for row in csv.DictReader(file)]
    draw.shuffle(rows)
    return (rows * (number // len(rows) + 1))[:number]


def made_up_captions(number: int, draw: random.Random) -> list[str]:
    """Return captions of 2 to 10 words, 8 tokens on average with those that begin and end one."""
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 10))) for _ in range(number)]


def part_of(batch: Batch, num_pairs: int) -> Batch:
    """Return the first pairs of a batch."""
    columns = ("image", "tokens", "sample", "caption_hash", "picture_hash")
    return Batch(**{name: getattr(batch, name)[:num_pairs] for name in columns})
