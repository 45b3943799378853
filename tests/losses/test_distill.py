"""Distillation: its value and gradient, teachers that run or whose features are stored, and what must be refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy
import pyarrow
import pytest
import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset
from open_clip.loss import DistillClipLoss
from PIL import Image
from pyarrow import parquet
from torch import Tensor
from torch.nn import functional

from accel_clip.config import DataConfig, LossConfig, ModelConfig
from accel_clip.data.bad_samples import UnusableSample
from accel_clip.data.batch import Batch
from accel_clip.data.examples import Preparation, columns_of_pair
from accel_clip.data.loader import BatchPlaces, TrainingPairs, iterate
from accel_clip.data.order import Order
from accel_clip.data.pairs import open_training
from accel_clip.data.sources.base import Pair
from accel_clip.data.sources.resolve import open_sources
from accel_clip.faults import ConfigError
from accel_clip.losses.base import Loss, build_loss, total
from accel_clip.losses.gradient import global_loss_gradient
from accel_clip.models.anatomy import examine
from accel_clip.models.build import ClipModel, build_model
from accel_clip.models.data_parallel import DataParallel
from accel_clip.models.freezing import freeze_unused
from accel_clip.models.teacher import build_teacher
from accel_clip.models.training_model import TrainingModel
from accel_clip.step.chunks import Plan
from accel_clip.step.contrastive import ContrastiveStep
from helpers.commands import ROOT, train_py
from helpers.comparison import assert_equal_to_rounding, in_float64, rounding
from helpers.emulation import on_all
from helpers.models import SMALL_MODEL

CAPTIONS = ["a frog", "two cats on a mat", "a frog", "一只青蛙", "one white peahen on wet grass", "A Bird!"]
CPU = torch.device("cpu")


# --- the value and its gradient


def unit(*shape: int) -> Tensor:
    return functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def student(num_pairs: int) -> dict[str, Tensor]:
    torch.manual_seed(num_pairs)
    made = {"image_features": unit(num_pairs, 5), "text_features": unit(num_pairs, 5)}
    made["logit_scale"] = torch.tensor(13.0, dtype=torch.float64)
    return {name: value.requires_grad_() for name, value in made.items()}


def stored_batch(*teachers: tuple[Tensor, Tensor]) -> Batch:
    numbers = torch.arange(len(teachers[0][0]))
    extra = {f"{side}{i}": each for i, both in enumerate(teachers) for side, each in zip("it", both, strict=True)}
    blank = torch.zeros(len(numbers), 3, 8, 8, dtype=torch.uint8)
    return Batch(blank, torch.zeros(len(numbers), 4, dtype=torch.int64), numbers, numbers, numbers, extra)


def stored_loss(num_teachers: int, **options: object) -> Loss:
    columns = {f"{side}_columns": [f"{side[0]}{i}" for i in range(num_teachers)] for side in ("image", "text")}
    return build_loss(LossConfig("distill", {**columns, **options}))


def test_one_teacher_is_distillation_as_open_clip_has_it() -> None:
    given, teacher = student(7), (unit(7, 9), unit(7, 9))
    loss = stored_loss(1, teacher_scales=30, weight=0.25)
    ours = loss({**given, **loss.columns(stored_batch(teacher), CPU)})
    scale = torch.tensor(30.0).double()
    theirs = DistillClipLoss()(*given.values(), *teacher, scale, output_dict=True)
    torch.testing.assert_close(ours["contrastive_loss"], theirs["contrastive_loss"], rtol=1e-12, atol=0)
    torch.testing.assert_close(ours["distill_loss"], 0.25 * theirs["distill_loss"], rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(total(ours), list(given.values()))
    expected = torch.autograd.grad(theirs["contrastive_loss"] + 0.25 * theirs["distill_loss"], list(given.values()))
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-13)


def dense(given: dict[str, Tensor], teachers: list[tuple[Tensor, Tensor]], scales: list[float]) -> Tensor:
    """Cross-entropies one row and one teacher at a time, no library function."""

    def cross_entropy(wanted: Tensor, got: Tensor) -> Tensor:
        return -(wanted.exp() / wanted.exp().sum() * (got - got.exp().sum().log())).sum()

    x, y, s = given.values()
    num, values = len(x), []
    for (images, texts), scale in zip(teachers, scales, strict=True):
        for i in range(num):
            wanted = torch.stack([scale * images[i] @ texts[j] for j in range(num)])
            values.append(cross_entropy(wanted, torch.stack([s * x[i] @ y[j] for j in range(num)])))
            wanted = torch.stack([scale * images[j] @ texts[i] for j in range(num)])
            values.append(cross_entropy(wanted, torch.stack([s * x[j] @ y[i] for j in range(num)])))
    return torch.stack(values).mean()


THREE = ((6, 4), (6, 11), (6, 5))  # widths differ between teachers
SCALES = [20.0, 3.0, 8.0]


def three_teachers() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    return [(unit(*shape), unit(*shape)) for shape in THREE]


def test_several_teachers_are_averaged_whatever_the_length_of_stored_features() -> None:
    given, teachers = student(6), three_teachers()
    loss = stored_loss(3, teacher_scales=SCALES)
    longer = [(3 * images, 0.5 * texts) for images, texts in teachers]
    terms = loss({**given, **loss.columns(stored_batch(*longer), CPU)})
    expected = dense(given, teachers, SCALES)
    torch.testing.assert_close(terms["distill_loss"], expected, rtol=1e-12, atol=0)
    for own, reference in zip(
        torch.autograd.grad(terms["distill_loss"], list(given.values())),
        torch.autograd.grad(expected, list(given.values())),
        strict=True,
    ):
        torch.testing.assert_close(own, reference, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_processes_together_have_the_gradient_of_the_whole_batch(num_processes: int) -> None:
    given, teachers = student(6), three_teachers()
    loss = stored_loss(3, teacher_scales=SCALES)
    whole = {**given, **loss.columns(stored_batch(*teachers), CPU)}
    expected = dict(zip(given, torch.autograd.grad(loss.total(whole), list(given.values())), strict=True))
    share = 6 // num_processes

    def rows_of(process: int) -> dict[str, Tensor]:
        own = slice(process * share, (process + 1) * share)
        part = {name: each[own] for name, each in given.items() if each.ndim}
        columns = loss.columns(stored_batch(*[(images[own], texts[own]) for images, texts in teachers]), CPU)
        return {**part, "logit_scale": given["logit_scale"], **columns}

    made, _ = on_all(num_processes, lambda process: global_loss_gradient(process, loss, rows_of(process.process_index)))
    for side in ("image_features", "text_features"):
        rows = torch.cat([each.by_row[side] for each in made])
        torch.testing.assert_close(rows, expected[side], rtol=1e-10, atol=1e-13)
    scale = torch.stack([each.by_scalar["logit_scale"] for each in made]).mean()
    torch.testing.assert_close(scale, expected["logit_scale"], rtol=1e-10, atol=1e-13)


def test_without_teachers_columns_as_in_validation_it_is_clips_loss() -> None:
    given = student(7)
    terms = stored_loss(2)(given)
    assert list(terms) == ["contrastive_loss"]
    clip = build_loss(LossConfig("clip"))(given)["contrastive_loss"]
    torch.testing.assert_close(terms["contrastive_loss"], clip, rtol=1e-12, atol=0)


def test_a_large_scale_stays_finite_in_float32() -> None:
    torch.manual_seed(0)
    given = {name: each.detach().float() for name, each in student(8).items()} | {"logit_scale": torch.tensor(100.0)}
    loss = stored_loss(1)
    value = loss.total({**given, **loss.columns(stored_batch((unit(8, 3).float(), unit(8, 3).float())), CPU)})
    assert math.isfinite(value.item())


# --- teachers that run


def described(folder: Path, name: str, size: int = 32, context: int = 32, **text: object) -> str:
    model = json.loads(SMALL_MODEL)
    model["vision_cfg"]["image_size"] = size
    model["text_cfg"].update({"context_length": context, **text})
    (folder / f"{name}.json").write_text(json.dumps(model))
    return str(folder / f"{name}.json")


def trained(folder: Path, name: str, seed: int = 8, **described_as: object) -> dict[str, str]:
    """Write a model with weights and return its settings."""
    settings = {"name": described(folder, name, **described_as), "pretrained": str(folder / f"{name}.pt")}
    torch.manual_seed(seed)
    clip = build_model(ModelConfig(settings["name"])).clip
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(40.0))
    torch.save(clip.state_dict(), settings["pretrained"])
    return settings


def a_student(folder: Path, name: str) -> ClipModel:
    torch.manual_seed(1)
    return build_model(ModelConfig(described(folder, name)))


def a_batch(model: ClipModel) -> Batch:
    torch.manual_seed(7)
    numbers = torch.arange(len(CAPTIONS))
    image = torch.randint(0, 256, (len(CAPTIONS), 3, 32, 32), dtype=torch.uint8)
    return Batch(image, model.tokenizer(CAPTIONS), numbers, numbers, numbers)


def prepared(options: dict[str, object], model: ClipModel) -> Loss:
    loss = build_loss(LossConfig("distill", options))
    loss.prepare(model, Accelerator(cpu=True))
    return loss


def step_gradients(
    model: ClipModel, loss: Loss, batch: Batch, rows: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the terms and the gradients of one step in micro-batches of so many rows."""
    anatomy = examine(model.clip, model.tokenizer)
    wrapped = TrainingModel(model, anatomy.separate).to(model.clip.logit_scale.dtype).train()
    model.clip.zero_grad()
    terms = ContrastiveStep(
        DataParallel(Accelerator(cpu=True), wrapped), loss, anatomy, Plan(rows, rows, {"image": 1, "text": 0}, 32)
    )(batch)
    return terms, {name: each.grad.clone() for name, each in model.clip.named_parameters()}


def open_clips(
    model: ClipModel, teacher: ClipModel, batch: Batch, weight: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the terms and the gradients of open_clip's own loss of the whole batch."""
    mean, std = (torch.tensor(model.preprocess_config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    pixels = (batch.image.to(model.clip.logit_scale.dtype) / 255 - mean) / std
    with torch.no_grad():
        told = teacher.clip(pixels, batch.tokens)
    model.clip.zero_grad()
    given = model.clip(pixels, batch.tokens)
    names = ("image_features", "text_features", "logit_scale")
    terms = DistillClipLoss()(*(given[n] for n in names), *(told[n] for n in names), output_dict=True)
    terms["distill_loss"] = weight * terms["distill_loss"]
    total(terms).backward()
    gradients = {name: each.grad.clone() for name, each in model.clip.named_parameters()}
    return {name: each.detach() for name, each in terms.items()}, gradients


@pytest.mark.parametrize("rows", [2, 6])
def test_a_step_with_a_running_teacher_is_autograd_over_the_whole_batch(tmp_path: Path, rows: int) -> None:
    model = a_student(tmp_path, "student_of_one")
    loss = prepared({"teachers": trained(tmp_path, "teacher_of_one"), "weight": 2.0}, model)
    batch = a_batch(model)
    terms, gradients = step_gradients(model, loss, batch, rows)

    teacher = build_model(ModelConfig(**trained(tmp_path, "teacher_of_one")))
    teacher.clip.eval()
    terms_32, single = open_clips(model, teacher, batch, weight=2.0)
    terms_64, exact = open_clips(in_float64(model), in_float64(teacher), batch, weight=2.0)
    assert_equal_to_rounding({**terms, **gradients}, {**terms_32, **single}, {**terms_64, **exact})


def test_a_teacher_is_neither_trained_nor_moved_by_training(tmp_path: Path) -> None:
    model = a_student(tmp_path, "student_beside")
    loss = prepared({"teachers": trained(tmp_path, "teacher_beside")}, model)
    teacher = loss.function.running[0].clip
    assert list(loss.parameters()) == [] and not any(each.requires_grad for each in teacher.parameters())
    step_gradients(model, loss, a_batch(model), 4)
    assert not teacher.training and all(each.grad is None for each in teacher.parameters())
    columns = loss.columns(a_batch(model), CPU)
    assert not columns["teacher_image_features"].requires_grad


def test_nothing_of_the_student_is_frozen_and_randomness_goes_on(tmp_path: Path) -> None:
    model, teacher = a_student(tmp_path, "student_all"), trained(tmp_path, "teacher_all")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loss = prepared({"teachers": teacher}, model)
    freeze_unused(model, loss)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert all(each.requires_grad for each in model.clip.parameters())


def test_a_teacher_sees_pictures_at_its_own_size_and_captions_in_its_own_context(tmp_path: Path) -> None:
    model = a_student(tmp_path, "student_small")
    settings = trained(tmp_path, "teacher_large", size=48, context=77)
    teacher = build_teacher(ModelConfig(**settings), model.tokenizer, Accelerator(cpu=True))
    assert teacher.trims and teacher.logit_scale == pytest.approx(40.0, rel=rounding(1))
    batch, alone = a_batch(model), build_model(ModelConfig(**settings))
    exact_clip = in_float64(alone).clip.eval()
    with torch.no_grad():
        texts = alone.clip.eval().encode_text(alone.tokenizer(CAPTIONS), normalize=True)
        # Pillow's bicubic filter, channel by channel in float32: an implementation of its own
        resized = numpy.stack(
            [
                [numpy.asarray(Image.fromarray(channel).resize((48, 48), Image.Resampling.BICUBIC)) for channel in each]
                for each in batch.image.numpy().astype(numpy.float32)
            ]
        )
        mean, std = (torch.tensor(alone.preprocess_config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        pixels = (torch.from_numpy(resized).clamp(0, 255) / 255 - mean) / std
        images = alone.clip.encode_image(pixels, normalize=True)
        exact = {"text": exact_clip.encode_text(alone.tokenizer(CAPTIONS), normalize=True)}
        exact["image"] = exact_clip.encode_image(pixels.double(), normalize=True)
    made = {"text": teacher.text_features(batch.tokens, CPU), "image": teacher.image_features(batch.image, CPU)}
    assert_equal_to_rounding(made, {"text": texts, "image": images}, exact)


def test_more_rows_than_a_teacher_takes_at_once_keep_their_order(tmp_path: Path) -> None:
    model = a_student(tmp_path, "student_many")
    teacher = build_teacher(ModelConfig(**trained(tmp_path, "teacher_many")), model.tokenizer, Accelerator(cpu=True))
    torch.manual_seed(0)
    image = torch.randint(0, 256, (150, 3, 32, 32), dtype=torch.uint8)
    tokens = model.tokenizer([f"{'very ' * (i % 7)}{i % 90}" for i in range(150)])
    exact = in_float64(teacher.model).clip
    images, texts = teacher.image_features(image, CPU), teacher.text_features(tokens, CPU)
    for some in (0, 63, 64, 149):
        one = slice(some, some + 1)
        alone = {"image": teacher.image_features(image[one], CPU), "text": teacher.text_features(tokens[one], CPU)}
        expected = {"image": exact.encode_image(teacher.pixels(image[one]).double(), normalize=True)}
        expected["text"] = exact.encode_text(tokens[one], normalize=True)
        assert_equal_to_rounding({"image": images[one], "text": texts[one]}, alone, expected)


@pytest.mark.parametrize(
    "other",
    [{"context": 16}, {"tokenizer_kwargs": {"clean": "canonicalize"}}],
    ids=["shorter context", "other cleaning"],
)
def test_a_teacher_with_other_tokens_is_refused_with_the_way_out(tmp_path: Path, other: dict[str, object]) -> None:
    model = a_student(tmp_path, "student_other")
    name = f"teacher_other_{next(iter(other))}"
    with pytest.raises(ConfigError, match=r"loss\.options\.teachers: .*tokenizer.*loss\.options\.image_columns"):
        prepared({"teachers": trained(tmp_path, name, **other)}, model)


def test_a_longer_context_is_refused_where_padding_counts(tmp_path: Path) -> None:
    model = a_student(tmp_path, "student_padded")
    settings = trained(tmp_path, "teacher_padded", context=77, no_causal_mask=True)
    with pytest.raises(ConfigError, match="has another tokenizer or a shorter context"):
        prepared({"teachers": settings}, model)


def test_a_teacher_that_cannot_be_built_names_its_setting(tmp_path: Path) -> None:
    model = a_student(tmp_path, "student_lonely")
    with pytest.raises(ConfigError, match=r"loss\.options\.teachers: .*unknown model 'ViT-B-23'.*ViT-B-32"):
        prepared({"teachers": {"name": "ViT-B-23", "pretrained": "openai"}}, model)
    with pytest.raises(ConfigError, match=r"loss\.options\.teachers: 'tiny' has random weights"):
        prepared({"teachers": [{"name": "tiny"}]}, model)


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"loss\.options\.teachers: .*name one"),
        ({"teachers": "ViT-B-32"}, r"loss\.options\.teachers"),
        ({"teachers": [{"nam": "tiny"}]}, r"unknown key 'nam', did you mean 'name'"),
        ({"teachers": [{"pretrained": "openai"}]}, "needs a name"),
        ({"image_columns": ["a", "b"], "text_columns": "c"}, r"loss\.options\.text_columns"),
        ({"image_columns": "a", "text_columns": "b", "teacher_scales": [1, 2]}, "needs 1 numbers above 0"),
        ({"image_columns": "a", "text_columns": "b", "teacher_scales": 0}, r"loss\.options\.teacher_scales"),
        ({"image_columns": "a", "text_columns": "b", "weight": 0}, r"loss\.options\.weight"),
        ({"image_columns": "a", "text_columns": "b", "wieght": 1}, "did you mean 'weight'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_loss(LossConfig("distill", options))


def test_scales_go_to_the_models_first(tmp_path: Path) -> None:
    model = a_student(tmp_path, "student_scales")
    teacher = trained(tmp_path, "teacher_scales")
    columns = {"teachers": teacher, "image_columns": "a", "text_columns": "b"}
    assert prepared(columns, model).function.teacher_scales() == [pytest.approx(40.0, rel=rounding(1)), 100.0]
    assert prepared({**columns, "teacher_scales": [None, 7]}, model).function.teacher_scales()[1] == 7
    assert prepared({**columns, "teacher_scales": [5, None]}, model).function.teacher_scales() == [5, 100.0]


def test_models_and_stored_features_teach_together(tmp_path: Path) -> None:
    model, given, stored = a_student(tmp_path, "student_both"), student(6), (unit(6, 3), unit(6, 3))
    options = {"teachers": trained(tmp_path, "teacher_both"), "image_columns": "i0", "text_columns": "t0"}
    loss = prepared({**options, "teacher_scales": [5, 9]}, model)
    batch = a_batch(model)
    batch.extra.update(stored_batch(stored).extra)
    terms = loss({**given, **loss.columns(batch, CPU)})
    teacher = loss.function.running[0]
    running = (teacher.image_features(batch.image, CPU).double(), teacher.text_features(batch.tokens, CPU).double())
    torch.testing.assert_close(
        terms["distill_loss"], dense(given, [running, stored], [5, 9]), rtol=rounding(32), atol=0
    )


def test_the_recipe_names_a_teacher_that_the_loss_takes() -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "distill.yaml").read_text(encoding="utf-8"))
    loss = build_loss(LossConfig(recipe["loss"]["name"], recipe["loss"]["options"]))
    assert loss.function.configs[0].name == "ViT-L-14" and loss.data_columns() == ()


# --- features stored with the data


def pictures(folder: Path, number: int = 6) -> list[str]:
    torch.manual_seed(2)
    for i in range(number):
        pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(number)]


def rows_with(folder: Path, **columns: list[object]) -> dict[str, list[object]]:
    number = len(next(iter(columns.values())))
    return {"image": pictures(folder, number), "caption": [f"caption {i}" for i in range(number)], **columns}


def write_table(folder: Path, kind: str, rows: dict[str, list[object]]) -> str:
    names, table = list(rows), pyarrow.table(rows)
    if kind == "fixed":
        index = names.index("f")
        fixed = pyarrow.array(rows["f"], pyarrow.list_(pyarrow.float32(), len(rows["f"][0])))
        table, kind = table.set_column(index, "f", fixed), "parquet"
    file = folder / f"table.{kind}"
    lines = [dict(zip(names, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    if kind == "parquet":
        parquet.write_table(table, file)
    elif kind == "jsonl":
        file.write_text("\n".join(json.dumps(line) for line in lines))
    elif kind == "csv":
        cells = [";".join(str(v) if isinstance(v, str) else json.dumps(v) for v in line.values()) for line in lines]
        file.write_text("\n".join([";".join(names), *cells]))
    else:
        file = folder / "saved"
        Dataset.from_dict(rows).save_to_disk(file)
        rows["image"][:] = [str(folder / each) for each in rows["image"]]
        Dataset.from_dict(rows).save_to_disk(file)
    return str(file)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "fixed", "saved"])
def test_numbers_of_every_kind_of_table(tmp_path: Path, kind: str) -> None:
    numbers = [[0.1, -2.5e-8, 3.0], [1 / 3, 7.0, 1e30], [0.0, 1.0, 2.0]]
    file = write_table(tmp_path, kind, rows_with(tmp_path, f=numbers, other=["x", "y", "z"]))
    data = DataConfig(train=[file], val_fraction=0, image_root="/")
    source = open_training(data, ("f",)).source
    for index, expected in enumerate(numbers):
        assert list(source[index].extra) == ["f"]
        assert source[index].extra["f"].dtype == numpy.float32
        assert source[index].extra["f"].tolist() == numpy.float32(expected).tolist()
    assert open_training(data).source[0].extra == {}


BROKEN = [[1.0, 2.0], [1.0], None, [1.0, math.nan], [1.0, 1e300], "one, two", [[1.0], [2.0]], {"a": 1}]


@pytest.mark.parametrize("cell", BROKEN[1:], ids=str)
def test_a_cell_without_its_numbers_makes_the_sample_unusable(tmp_path: Path, cell: object) -> None:
    rows = rows_with(tmp_path, f=[json.dumps(BROKEN[0]), "" if cell is None else json.dumps(cell)])
    source = open_sources([write_table(tmp_path, "csv", rows)], DataConfig(), ("f",))
    assert source[0].extra["f"].tolist() == [1.0, 2.0]
    with pytest.raises(UnusableSample, match="the column 'f' holds") as caught:
        source[1]
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize("cell", BROKEN[1:5], ids=str)
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_so_does_one_in_a_typed_table(tmp_path: Path, kind: str, cell: object) -> None:
    file = write_table(tmp_path, kind, rows_with(tmp_path, f=[BROKEN[0], cell]))
    source = open_sources([file], DataConfig(), ("f",))
    with pytest.raises(UnusableSample, match="the column 'f' holds"):
        source[1]


def test_columns_that_are_not_there_are_refused(tmp_path: Path) -> None:
    file = write_table(tmp_path, "parquet", rows_with(tmp_path, features=[[1.0], [2.0]], words=["x", "y"]))
    with pytest.raises(ConfigError, match=r"loss\.options: .*no column 'feature', did you mean 'features'"):
        open_training(DataConfig(train=[file]), ("feature",))
    with pytest.raises(ConfigError, match=r"loss\.options: the column 'words' .*holds no lists of numbers"):
        open_training(DataConfig(train=[file]), ("words",))
    with pytest.raises(ConfigError, match=r"loss\.options: the source 'demo' has no column 'features'"):
        open_training(DataConfig(train=[file, "demo"]), ("features",))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in pictures(folder, 2):
        (folder / name).with_suffix(".txt").write_text("a caption")
    with pytest.raises(ConfigError, match="has no column 'features'"):
        open_training(DataConfig(train=[str(folder)]), ("features",))


def test_sources_with_other_widths_are_refused(tmp_path: Path) -> None:
    files = []
    for width in (2, 3):
        folder = tmp_path / str(width)
        folder.mkdir()
        files.append(write_table(folder, "parquet", rows_with(folder, f=[[1.0] * width] * 2)))
    with pytest.raises(ConfigError, match=r"the column 'f' holds 2 numbers in .*, 3 numbers in"):
        open_training(DataConfig(train=files), ("f",))


def test_numbers_cannot_mean_one_of_several_captions() -> None:
    with pytest.raises(UnusableSample, match="2 captions share the numbers in f"):
        columns_of_pair(Pair(b"", ("a", "b"), extra={"f": (1.0, 2.0)}))
    assert columns_of_pair(Pair(b"", ("a",), extra={"f": (1.0, 2.0)}))["f"].dtype == torch.float32


def test_columns_of_two_widths_are_no_teacher() -> None:
    loss = stored_loss(1)
    with pytest.raises(ConfigError, match="'i0' has 3 numbers and 't0' 4"):
        loss.columns(stored_batch((unit(5, 3), unit(5, 4))), CPU)


def first_batch(file: str, model: ClipModel, columns: tuple[str, ...], num_workers: int = 0) -> Batch:
    config = DataConfig(train=[file], val_fraction=0)
    source = open_training(config, columns).source
    order = Order(len(source), len(source), 3)
    pairs = TrainingPairs(source, order, Preparation(model.tokenizer, (32, 32), 1e6, 3))
    return next(iterate(pairs, BatchPlaces(order, range(1), 0, 1), config, num_workers, False))


def test_stored_features_teach_what_the_running_teacher_teaches(tmp_path: Path) -> None:
    model, teacher = a_student(tmp_path, "student_stored"), trained(tmp_path, "teacher_stored")
    rows = rows_with(tmp_path, number=list(range(6)))
    batch = first_batch(write_table(tmp_path, "csv", rows), model, ())
    running = prepared({"teachers": teacher}, model)
    columns = running.columns(batch, CPU)
    by_sample = batch.sample.argsort()
    # Names of the model's own outputs are natural for stored features, and must not be mistaken for them.
    for side in ("image_features", "text_features"):
        rows[side] = columns[f"teacher_{side}"][by_sample].tolist()
    options = {"image_columns": "image_features", "text_columns": "text_features", "teacher_scales": 40.0}
    stored = prepared(options, model)
    again = first_batch(write_table(tmp_path, "parquet", rows), model, stored.data_columns(), num_workers=1)
    assert torch.equal(again.image, batch.image) and sorted(again.extra) == ["image_features", "text_features"]
    terms, gradients = step_gradients(model, running, batch, 3)
    stored_terms, stored_gradients = step_gradients(model, stored, again, 3)
    assert terms["distill_loss"] > 0.1
    terms_64, exact = step_gradients(in_float64(model), running, batch, 3)
    assert_equal_to_rounding({**stored_terms, **stored_gradients}, {**terms, **gradients}, {**terms_64, **exact})


# --- a run


@pytest.mark.slow
def test_a_run_with_both_kinds_of_teachers(tmp_path: Path) -> None:
    teacher = trained(tmp_path, "teacher")
    numbers = [functional.normalize(torch.randn(4), dim=0).tolist() for _ in range(24)]
    table = write_table(tmp_path, "jsonl", rows_with(tmp_path, ours=numbers, theirs=numbers[::-1]))
    options = {"teachers": [teacher], "image_columns": "ours", "text_columns": "theirs", "teacher_scales": [None, 20]}
    config = {
        "output_dir": "run",
        "data": {"train": [table], "val_fraction": 0.2, "workers": 1},
        "model": {"name": described(tmp_path, "pupil")},
        "loss": {"name": "distill", "options": options},
        "train": {"batch_size": 8, "steps": 2, "micro_batch_size": 4},
        "track": {"every": 1, "to": []},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = train_py("--config", "config.yaml", folder=tmp_path)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["loss"] == pytest.approx(line["loss/contrastive_loss"] + line["loss/distill_loss"], rel=rounding(1))
    refused = train_py("--config", "config.yaml", "--data.train", "demo", "--output_dir", "other", folder=tmp_path)
    assert refused.code == 2 and "has no column 'ours'" in refused.err
