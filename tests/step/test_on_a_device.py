"""A step on a device that is not the host: what it sends there, and that it never asks for a value."""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from accel_clip.config import LossConfig
from accel_clip.losses.base import build_loss
from accel_clip.models.anatomy import examine
from accel_clip.models.data_parallel import DataParallel
from accel_clip.models.training_model import TrainingModel
from accel_clip.process import transfer
from accel_clip.step.chunks import cut_batch
from accel_clip.step.contrastive import ContrastiveStep
from helpers.steps import Plan, make_batch, make_model

META = torch.device("meta")


class Elsewhere:
    """An accelerator whose device holds no values: whatever asks for one raises."""

    device = META

    def __init__(self) -> None:
        self.inner = Accelerator(cpu=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def gather(self, rows: Tensor) -> Tensor:
        return rows


def sends_of_a_step(
    folder: Path, loss_name: str, plan: Any, monkeypatch: pytest.MonkeyPatch, bias: bool = False
) -> tuple[dict[str, Tensor], Counter[str]]:
    """Return the terms of a step on a device without values, and what goes there, by the file that sends it."""
    model = make_model(folder, bias=bias)
    batch, anatomy = make_batch(model), examine(model.clip, model.tokenizer)
    wrapped = TrainingModel(model, anatomy.separate).to(META).train()
    step = ContrastiveStep(DataParallel(Elsewhere(), wrapped), build_loss(LossConfig(loss_name)), anatomy, plan)
    sends: Counter[str] = Counter()
    move = Tensor.to

    def to(tensor: Tensor, *given: Any, **named: Any) -> Tensor:
        if META in (*given, *named.values()) and tensor.device != META:
            sends[Path(inspect.stack()[1].filename).name] += 1
        return move(tensor, *given, **named)

    monkeypatch.setattr(Tensor, "to", to)
    return step(batch), sends


@pytest.mark.parametrize("loss_name", ["clip", "siglip"])
@pytest.mark.parametrize("plan", [Plan(13, 99), Plan(4, 0), Plan(3, 2)], ids=["whole", "twice", "some kept"])
def test_a_step_asks_its_device_for_no_value(
    tmp_path: Path, loss_name: str, plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms, sends = sends_of_a_step(tmp_path, loss_name, plan, monkeypatch, bias=loss_name == "siglip")
    assert terms and all(each.device == META for each in terms.values())
    assert set(sends) == {Path(transfer.__file__).name}


def test_what_says_where_rows_belong_is_sent_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = sends_of_a_step(tmp_path, "clip", Plan(13, 99), monkeypatch)
    assert whole.total() == 4 + text_groups(tmp_path)  # pictures, places, two hashes, and each group of captions


def text_groups(folder: Path) -> int:
    model = make_model(folder)
    chunked = cut_batch(make_batch(model), examine(model.clip, model.tokenizer), Plan(13, 99))
    return sum(len(chunk.inputs["text"]) for chunk in chunked.chunks if chunk.side == "text")


def test_pictures_are_cut_without_a_copy(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    batch = make_batch(model)
    chunks = cut_batch(batch, examine(model.clip, model.tokenizer), Plan(4, 0)).chunks
    pictures = [chunk.inputs["image"] for chunk in chunks if chunk.side == "image"]
    assert torch.equal(torch.cat(pictures), batch.image)
    assert all(part.untyped_storage().data_ptr() == batch.image.untyped_storage().data_ptr() for part in pictures)
