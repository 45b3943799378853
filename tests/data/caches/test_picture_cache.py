"""Decoded pictures on disk: batches stay what they are to the bit, and nothing is decoded a second time."""

from __future__ import annotations

import errno
import io
import pickle
import tarfile
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from accel_clip import Config, train
from accel_clip.command_line import parse_config
from accel_clip.config import DataConfig, ModelConfig, TrainConfig
from accel_clip.data import examples
from accel_clip.data.batch import Batch
from accel_clip.data.caches import picture_building
from accel_clip.data.caches.folder import CacheWriter
from accel_clip.data.caches.picture_building import GIB, open_pictures
from accel_clip.data.caches.pictures import PictureCache
from accel_clip.data.examples import preparation_for
from accel_clip.data.loader import BatchPlaces, TrainingPairs, iterate
from accel_clip.data.order import Order
from accel_clip.data.pairs import open_training
from accel_clip.data.pictures.decode import decode_small
from accel_clip.data.sources.base import SOURCES, Pair, Source
from accel_clip.faults import ConfigError, DataError, StorageError
from accel_clip.files.marked import settle
from accel_clip.files.names import DRAFT, beside, unfinished
from accel_clip.models.build import ClipModel, build_model
from accel_clip.process.signals import StopAsked
from accel_clip.process.waiting import Lookout
from helpers.commands import CPU_2, launch, losses_of, train_py
from helpers.models import small_model

NUM_REPEATED = 3
PROGRAM_ARGUMENTS = ("train.py", "")


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    bands = numpy.random.default_rng(width).integers(0, 256, (height, width, 4), dtype=numpy.uint8)
    return Image.fromarray(bands).convert(mode) if mode != "RGBA" else Image.fromarray(bands, "RGBA")


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def write_pictures(folder: Path) -> list[str]:
    """Write pictures of all kinds, seen at 32 pixels: JPEGs decoded at every scale, turned, transparent, deep."""
    written = {
        "eighth.jpg": (noise(640, 480), {}),
        "quarter.jpg": (noise(300, 200), {"progressive": True}),
        "half.jpg": (noise(131, 90), {"subsampling": 0}),
        "whole.jpg": (noise(47, 50), {}),
        "turned.jpg": (noise(301, 160), {"exif": turned(6)}),
        "mirrored.jpg": (noise(66, 70), {"exif": turned(2)}),
        "grey.jpg": (noise(200, 201, "L"), {}),
        "cmyk.jpg": (noise(99, 100, "CMYK"), {}),
        "long.jpg": (noise(600, 40), {}),
        "large.png": (noise(500, 400), {}),
        "small.png": (noise(34, 33), {"exif": turned(8)}),
        "alpha.png": (noise(150, 170, "RGBA"), {}),
        "palette.png": (noise(140, 120, "P"), {"transparency": 3}),
        "deep.png": (Image.fromarray(numpy.arange(180 * 160, dtype=numpy.uint16).reshape(180, 160)), {}),
        "lossy.webp": (noise(290, 310, "RGBA"), {}),
        "frames.gif": (noise(64, 90, "P"), {}),
        "tiny.bmp": (noise(3, 2), {}),
    }
    for name, (picture, options) in written.items():
        picture.save(folder / name, **options)
    return list(written)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Write the pictures in rows with two captions each; further rows show the first picture."""
    names = write_pictures(tmp_path)
    rows = [f"{name},picture {name} with words,a caption of {name}" for name in names + names[:1] * NUM_REPEATED]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption,title", *rows]), encoding="utf-8")
    return tmp_path / "pairs.csv"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ClipModel:
    return build_model(ModelConfig(small_model(tmp_path_factory.mktemp("model"))))


def config_for(table: Path, augmentation: str = "crop", room: float = 1.0, **more: Any) -> Config:
    data = DataConfig(
        train=[str(table)],
        caption_key=["caption", "title"],
        val_fraction=0,
        augmentation=augmentation,
        image_cache_gib=room,
        **more,
    )
    return Config(data=data, seed=3)


def pairs_of(config: Config) -> Source:
    return open_training(config.data).source


def cache_of(model: ClipModel, config: Config, folder: Path, num_workers: int = 0) -> PictureCache | None:
    accelerator = Accelerator(cpu=True)
    return open_pictures(accelerator, pairs_of(config), model, config, folder / "pictures", num_workers)


def batches_of(
    model: ClipModel,
    config: Config,
    pictures: PictureCache | None = None,
    num_workers: int = 0,
    process: int = 0,
    num_processes: int = 1,
) -> list[Batch]:
    """Return the batches of four epochs that a process gets."""
    pairs = pairs_of(config)
    order = Order(len(pairs), 6, config.seed)
    data = TrainingPairs(pairs, order, preparation_for(model, config, None, pictures))
    places = BatchPlaces(order, range(4 * order.batches_per_epoch), process, num_processes)
    return list(iterate(data, places, config.data, num_workers, pin_memory=False))


def not_called(*_: Any) -> Any:
    raise AssertionError("a picture was decoded again")


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "decode_small", not_called)
    monkeypatch.setattr(examples, "decode_picture", not_called)


@pytest.mark.parametrize(("num_workers", "num_processes"), [(0, 1), (2, 1), (0, 2), (2, 2)])
@pytest.mark.parametrize("augmentation", ["crop", "none"])
def test_batches_are_the_same_to_the_bit_and_nothing_is_decoded(
    table: Path,
    model: ClipModel,
    augmentation: str,
    num_workers: int,
    num_processes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_for(table, augmentation)
    expected = [batches_of(model, config, None, 0, each, num_processes) for each in range(num_processes)]
    cache = cache_of(model, config, table.parent, num_workers)
    forbid_decoding(monkeypatch)
    for process in range(num_processes):
        found = batches_of(model, config, cache, num_workers, process, num_processes)
        for batch, plain in zip(found, expected[process], strict=True):
            assert torch.equal(batch.image, plain.image) and batch.image.dtype == torch.uint8
            assert batch.image.shape == (6 // num_processes, 3, 32, 32)
            assert torch.equal(batch.sample, plain.sample) and torch.equal(batch.tokens, plain.tokens)
    seen = {sample: set() for batch in expected[0] for sample in batch.sample.tolist()}
    for batch in expected[0]:
        for sample, pixels in zip(batch.sample.tolist(), batch.image, strict=True):
            seen[sample].add(pixels.numpy().tobytes())
    several = sum(len(each) > 1 for each in seen.values())
    assert several == 0 if augmentation == "none" else several > len(seen) / 2  # parts are still drawn anew


def test_each_different_picture_is_decoded_once_at_the_scale_of_training(
    table: Path, model: ClipModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decoded = []

    def counted(image: Path, *rest: Any) -> Image.Image:
        decoded.append(image.name)
        return decode_small(image, *rest)

    monkeypatch.setattr(examples, "decode_small", counted)
    monkeypatch.setattr(picture_building, "NUM_TO_ESTIMATE", 1)
    config = config_for(table)
    cache = cache_of(model, config, table.parent)
    assert cache is not None
    num_pictures = len(pairs_of(config)) - NUM_REPEATED
    assert len(cache) == num_pictures == len(set(decoded)) == len(decoded) - 1  # one to see whether they fit
    assert f"pictures: {num_pictures} decoded once, " in capsys.readouterr().err
    shapes = {tuple(shape) for shape in cache.places[:, 1:].tolist()}
    assert {(60, 80, 3), (50, 75, 3), (45, 66, 3), (50, 47, 3)} <= shapes  # 1/8, 1/4, 1/2 and 1 of a JPEG
    assert cache.num_bytes == (cache.folder / "pixels.bin").stat().st_size == sum(h * w * 3 for h, w, _ in shapes)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unusable_pictures_are_met_as_without_the_cache(
    table: Path, model: ClipModel, num_workers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (table.parent / "half.jpg").write_bytes(b"<html>")
    (table.parent / "large.png").unlink()
    cut = table.parent / "eighth.jpg"
    cut.write_bytes(cut.read_bytes()[:5000])
    config = config_for(table, max_pixels=90_000)
    expected = batches_of(model, config)
    assert {bad.reason for batch in expected for bad in batch.bad_samples} == {
        *("unreadable", "missing_file", "too_large")
    }
    cache = cache_of(model, config, table.parent, num_workers)
    assert cache is not None and len(cache.unusable) == 3
    assert f"3 of {len(cache)} are unusable" in capsys.readouterr().err
    forbid_decoding(monkeypatch)
    found = batches_of(model, config, cache, num_workers)
    assert [batch.bad_samples for batch in found] == [batch.bad_samples for batch in expected]
    assert [batch.sample.tolist() for batch in found] == [batch.sample.tolist() for batch in expected]


def test_pictures_stored_as_bytes_that_are_nearly_alike_keep_their_own_pixels(tmp_path: Path, model: ClipModel) -> None:
    marked = numpy.zeros((24, 160, 160), numpy.uint8)
    for number in range(24):
        marked[number, 20 + 5 * number] = 255
    pictures = []
    for each in marked:
        buffer = io.BytesIO()
        Image.fromarray(each).convert("RGB").save(buffer, "BMP")
        pictures.append(buffer.getvalue())
    rows = pyarrow.table({"image": pictures, "caption": [f"bar {number}" for number in range(24)]})
    pyarrow.parquet.write_table(rows, tmp_path / "bars.parquet")
    config = config_for(tmp_path / "bars.parquet", augmentation="none")
    config = replace(config, data=replace(config.data, caption_key=["caption"]))
    cache = cache_of(model, config, tmp_path)
    assert cache is not None and len(cache) == 24
    found, expected = batches_of(model, config, cache), batches_of(model, config)
    assert all(torch.equal(batch.image, plain.image) for batch, plain in zip(found, expected, strict=True))
    assert all(len(batch.picture_hash.unique()) == 6 for batch in found)


def test_a_set_without_a_usable_picture_is_told_by_the_loader(table: Path, model: ClipModel) -> None:
    config = config_for(table, max_pixels=1)
    cache = cache_of(model, config, table.parent)
    assert cache is not None and cache.num_bytes == 0
    with pytest.raises(DataError, match="no sample can be used"):
        batches_of(model, config, cache)


# --- room


def test_pictures_that_would_not_fit_are_left_alone_and_it_is_said(
    table: Path, model: ClipModel, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = cache_of(model, config_for(table), table.parent)
    assert whole is not None
    below, enough = whole.num_bytes * 0.9 / GIB, whole.num_bytes / GIB
    assert cache_of(model, config_for(table, room=below), table.parent / "other") is None
    said = capsys.readouterr().err
    assert f"more than data.image_cache_gib = {below:g}: they are decoded in every epoch" in said
    assert "would take about" in said
    assert not list(table.parent.glob("other/*"))
    assert cache_of(model, config_for(table, room=enough), table.parent / "other") is not None


def no_estimate(pictures: Source, items: numpy.ndarray) -> Generator[None, None, int]:
    """Stand for an estimate that is far too small."""
    yield
    return 0


def estimate(pictures: picture_building.DifferentPictures) -> int:
    """Return what a whole estimate comes to."""
    estimating = picture_building.expected_picture_bytes(pictures, numpy.arange(len(pictures)))
    while True:
        try:
            next(estimating)
        except StopIteration as whole:
            return int(whole.value)


@pytest.mark.parametrize("stop_after", [1, 17, 19])  # of 17 pictures that are decoded for the estimate, then in pieces
def test_a_stop_is_heard_between_pictures_and_leaves_nothing(
    table: Path, model: ClipModel, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_building, "PICTURES_AT_ONCE", 4)
    config, beats = config_for(table), list[str]()
    lookout = Lookout(lambda: len(beats) >= stop_after, beats.append)
    with pytest.raises(StopAsked):
        open_pictures(Accelerator(cpu=True), pairs_of(config), model, config, table.parent / "pictures", 0, lookout)
    assert beats == ["decoding pictures"] * stop_after
    assert not list(table.parent.glob("*pictures*"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_room_is_a_limit_however_small_the_estimate_was(
    table: Path,
    model: ClipModel,
    num_workers: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(picture_building, "expected_picture_bytes", no_estimate)
    monkeypatch.setattr(picture_building, "PICTURES_AT_ONCE", 4)
    written = []
    write = CacheWriter.write
    monkeypatch.setattr(CacheWriter, "write", lambda self, values: (written.append(values.nbytes), write(self, values)))
    assert cache_of(model, config_for(table, room=1e5 / GIB), table.parent, num_workers) is None
    assert "the decoded pictures take more than data.image_cache_gib = " in capsys.readouterr().err
    assert sum(written) > 1e5 and sum(written) - written[-1] <= 1e5
    assert not list(table.parent.glob("pictures*"))


def test_the_estimate_is_near_what_is_taken(table: Path, model: ClipModel, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(table)
    pictures = picture_building.DifferentPictures(pairs_of(config), preparation_for(model, config).decoded)
    cache = cache_of(model, config, table.parent)
    assert cache is not None and estimate(pictures) == cache.num_bytes
    monkeypatch.setattr(picture_building, "NUM_TO_ESTIMATE", 12)
    assert 0.5 < estimate(pictures) / cache.num_bytes < 2


def test_a_full_disk_ends_the_run_with_what_is_needed_and_available(
    table: Path, model: ClipModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(model, config_for(table), table.parent)
    assert cache is not None
    monkeypatch.setattr(picture_building, "available_bytes", lambda folder: cache.num_bytes - 1)
    with pytest.raises(StorageError) as caught:
        cache_of(model, config_for(table), table.parent / "other")
    assert caught.value.exit_code == 5
    assert f"need about {cache.num_bytes} bytes and {cache.num_bytes - 1} are available" in str(caught.value)
    assert "data.image_cache_gib" in str(caught.value)


def test_a_disk_that_fills_up_meanwhile_is_left_without_half_a_cache(
    table: Path, model: ClipModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, values: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened_full(self: Any, *given: Any) -> None:
        start(self, *given)
        self.file = Full()

    start = CacheWriter.__init__
    monkeypatch.setattr(CacheWriter, "__init__", opened_full)
    with pytest.raises(StorageError, match=r"decoded pictures cannot be written: .*No space left"):
        cache_of(model, config_for(table), table.parent)
    assert not list(table.parent.glob("pictures*"))


# --- used again


def other_size(config: Config, table: Path) -> Config:
    return replace(config, model=ModelConfig(small_model(table.parent), options={"force_image_size": 48}))


def smaller_pictures(config: Config, table: Path) -> Config:
    return replace(config, data=replace(config.data, max_pixels=1e5))


def no_augmentation(config: Config, table: Path) -> Config:
    return replace(config, data=replace(config.data, augmentation="none"))


CHANGES = [
    (other_size, "preprocessing"),
    (smaller_pictures, "max_pixels"),
    (no_augmentation, "augmentation"),
]


@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_pictures_decoded_otherwise_are_replaced_and_it_is_said(
    table: Path, change: Callable[[Config, Path], Config], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = replace(config_for(table), model=ModelConfig(small_model(table.parent)))
    cache_of(build_model(before.model), before, table.parent)
    after = change(before, table)
    other = build_model(after.model)
    cache = cache_of(other, after, table.parent)
    assert f"were computed with other {named}: they are replaced" in capsys.readouterr().err
    found, expected = batches_of(other, after, cache), batches_of(other, after)
    assert all(torch.equal(batch.image, plain.image) for batch, plain in zip(found, expected, strict=True))


def counting_decoder(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that takes in the name of every file that is decoded from now on."""
    decoded: list[str] = []

    def counted(image: Path, *rest: Any) -> Image.Image:
        decoded.append(image.name)
        return decode_small(image, *rest)

    monkeypatch.setattr(examples, "decode_small", counted)
    monkeypatch.setattr(picture_building, "expected_picture_bytes", no_estimate)
    return decoded


def assert_same_batches(model: ClipModel, config: Config, cache: PictureCache | None) -> None:
    found, expected = batches_of(model, config, cache), batches_of(model, config)
    for batch, plain in zip(found, expected, strict=True):
        assert torch.equal(batch.image, plain.image) and torch.equal(batch.sample, plain.sample)
        assert batch.bad_samples == plain.bad_samples


def replaced_in_place(file: Path) -> None:
    """Replace a picture by another one whose file has as many bytes."""
    before = file.stat()
    content = io.BytesIO()
    turned = Image.open(file).transpose(Image.Transpose.ROTATE_180)
    turned.save(content, "BMP")
    file.write_bytes(content.getvalue())
    assert file.stat().st_size == before.st_size


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_changed_is_decoded_anew_alone_and_it_is_said(
    table: Path, model: ClipModel, num_workers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file is replaced, one by as many bytes, one mended, one has come, one row is gone, one stays broken."""
    folder, config = table.parent, config_for(table)
    good = (folder / "half.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(b"<html>")
    (folder / "grey.jpg").write_bytes(b"<html>")
    cache_of(model, config, folder, num_workers)
    (folder / "half.jpg").write_bytes(good)
    noise(77, 78).save(folder / "whole.jpg")
    replaced_in_place(folder / "tiny.bmp")
    noise(50, 51).save(folder / "late.png")
    rows = [line for line in table.read_text(encoding="utf-8").splitlines() if not line.startswith("deep.png")]
    table.write_text("\n".join([*rows, "late.png,a late one,late"]), encoding="utf-8")
    capsys.readouterr()
    decoded = counting_decoder(monkeypatch)
    cache = cache_of(model, config, folder, num_workers)
    said = capsys.readouterr().err
    assert "are used again, but for 2 changed, 1 new, 2 unusable before of 17" in said
    assert num_workers or sorted(decoded) == ["grey.jpg", "half.jpg", "late.png", "tiny.bmp", "whole.jpg"]
    assert cache is not None and len(cache) == 17 and len(cache.unusable) == 1
    assert_same_batches(model, config, cache)
    decoded.clear()
    capsys.readouterr()
    assert cache_of(model, config, folder) is not None
    assert "but for 1 unusable before of 17" in capsys.readouterr().err and decoded == ["grey.jpg"]


def test_the_room_is_counted_without_what_is_replaced(table: Path, model: ClipModel) -> None:
    whole = cache_of(model, config_for(table), table.parent)
    assert whole is not None
    config = config_for(table, room=whole.num_bytes / GIB)
    for name in ("large.png", "alpha.png", "palette.png", "deep.png", "lossy.webp"):
        replaced = Image.open(table.parent / name).convert("RGB").rotate(180)
        replaced.save(table.parent / name)
    cache = cache_of(model, config, table.parent)
    assert cache is not None and cache.num_bytes == whole.num_bytes


def test_pictures_that_are_still_unusable_cost_no_copy(table: Path, model: ClipModel) -> None:
    (table.parent / "half.jpg").unlink()
    config = config_for(table)
    cache_of(model, config, table.parent)
    before = {file: file.stat().st_ino for file in (table.parent / "pictures").iterdir()}
    cache = cache_of(model, config, table.parent)
    assert {file: file.stat().st_ino for file in (table.parent / "pictures").iterdir()} == before
    (table.parent / "half.jpg").write_bytes(b"<html>")  # unusable for another reason
    cache = cache_of(model, config, table.parent)
    assert cache is not None and [problem[0] for problem in cache.unusable.values()] == ["unreadable"]
    assert_same_batches(model, config, cache)


def test_a_cache_that_was_moved_beside_other_pictures_of_these_names(table: Path, model: ClipModel) -> None:
    cache_of(model, config_for(table), table.parent)
    other = table.parent / "other"
    other.mkdir()
    write_pictures(other)
    noise(60, 61).save(other / "large.png")
    (other / table.name).write_bytes(table.read_bytes())
    (table.parent / "pictures").rename(other / "pictures")
    config = config_for(other / table.name)
    assert_same_batches(model, config, cache_of(model, config, other))


def test_pictures_in_a_shard_that_was_written_anew(table: Path, model: ClipModel) -> None:
    shard = table.parent / "pairs.tar"
    config = config_for(shard, augmentation="none")
    config = replace(config, data=replace(config.data, caption_key=None))
    for colour in range(2):
        with tarfile.open(shard, "w") as tar:
            for number in range(8):
                picture = io.BytesIO()
                Image.new("RGB", (40, 40), (255 * colour, 30 * number, 0)).save(picture, "BMP")
                for ending, content in (("bmp", picture.getvalue()), ("txt", b"a colour")):
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        assert_same_batches(model, config, cache_of(model, config, table.parent))


def test_pictures_of_a_source_of_ones_own(
    table: Path,
    model: ClipModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    own_entries: None,
) -> None:
    @SOURCES.register("own")
    class Own:
        name = "own"

        def __init__(self, folder: str, options: Any) -> None:
            self.files = sorted(Path(folder).glob("*.png"))

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, index: int) -> Pair:
            return Pair(self.files[index], (self.files[index].stem,))

        def key(self, index: int) -> str:
            return self.files[index].name

    config = config_for(table)
    config = replace(config, data=replace(config.data, train=[f"own:{table.parent}"], caption_key=None))
    cache_of(model, config, table.parent)
    noise(33, 34).save(table.parent / "alpha.png")
    decoded = counting_decoder(monkeypatch)
    cache_of(model, config, table.parent)
    assert decoded == ["alpha.png"] and "but for 1 changed of 5" in capsys.readouterr().err


def test_the_same_pictures_are_used_again_and_shared_in_memory(
    table: Path, model: ClipModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache_of(model, config_for(table), table.parent)
    forbid_decoding(monkeypatch)
    again = cache_of(model, config_for(table), table.parent)
    assert again is not None and "are used again" in capsys.readouterr().err
    copy = pickle.loads(pickle.dumps(again))
    assert isinstance(copy.pixels, numpy.memmap) and not copy.pixels.flags.writeable
    assert len(pickle.dumps(again)) < 1000  # a folder, not the pictures
    key = int(again.keys[0])
    assert torch.equal(copy[key], again[key])
    with pytest.raises(DataError, match="changed since: remove this folder"):
        again[key + 1]


@pytest.mark.parametrize("end", ["killed", "truncated", "no about.json"])
def test_half_a_cache_is_not_read(table: Path, model: ClipModel, end: str) -> None:
    folder = table.parent / "pictures"
    whole = cache_of(model, config_for(table), table.parent)
    assert whole is not None
    keys, pixels = whole.keys.tolist(), {key: whole[key] for key in whole.keys.tolist()}
    if end == "killed":
        folder.rename(beside(folder, DRAFT))
        (unfinished(table.parent)[0] / "places.npy").unlink()
        settle(table.parent)
    elif end == "truncated":
        (folder / "pixels.bin").write_bytes((folder / "pixels.bin").read_bytes()[:-100])
    else:
        (folder / "about.json").unlink()
    assert PictureCache.if_whole(folder) is None
    found = cache_of(model, config_for(table), table.parent)
    assert found is not None and found.keys.tolist() == keys
    assert all(torch.equal(found[key], pixels[key]) for key in keys)
    assert [each.name for each in table.parent.glob("pictures*")] == ["pictures"]


def test_settings_that_make_no_sense_are_refused() -> None:
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"data\.image_cache_gib: .* 0 or more"):
            DataConfig(image_cache_gib=value)
    data = DataConfig(augmentation="none", image_cache_gib=1.0)
    cached = TrainConfig(cache_features=True)
    with pytest.raises(ConfigError, match=r"data\.image_cache_gib: 1\.0 .* set it to 0"):
        Config(data=data, model=ModelConfig(freeze=["image"]), train=cached)
    Config(data=data, model=ModelConfig(freeze=["text"]), train=cached)


# --- runs


def flags_of(table: Path, output: str, room: float, *more: str) -> list[str]:
    """Return the command line of eight SGD steps of 8 pairs: four epochs."""
    flags = {
        "output_dir": str(table.parent / output),
        "data.train": str(table),
        "data.caption_key": '["caption", "title"]',
        "data.val_fraction": "0",
        "data.workers": "0",
        "data.image_cache_gib": str(room),
        "model.name": small_model(table.parent),
        "optim.name": "sgd",
        "optim.lr": "0.1",
        "optim.warmup": "0",
        "train.batch_size": "8",
        "train.steps": "8",
        "train.threads": "1",
        "eval.every": "100",
        "checkpoint.every": "3",
        "track.to": "[]",
        "track.every": "1",
    }
    return [word for key, value in flags.items() for word in (f"--{key}", value)] + list(more)


@pytest.mark.slow
def test_a_run_with_the_cache_is_the_run_without_it_also_when_it_was_killed(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = parse_config(flags_of(table, "plain", 0), *PROGRAM_ARGUMENTS)
    train(plain)
    assert not (table.parent / "plain" / "pictures").exists()
    words = flags_of(table, "cached", 1)
    killed = train_py(*words, folder=table.parent, ACCEL_CLIP_FAULT="step:5")
    assert killed.code != 0 and "decoded once" in killed.err
    forbid_decoding(monkeypatch)
    train(parse_config(words, *PROGRAM_ARGUMENTS))
    assert "are used again" in capsys.readouterr().err
    expected = losses_of(table.parent / "plain")
    assert len(expected) == 8 and losses_of(table.parent / "cached") == expected


@pytest.mark.slow
def test_two_processes_share_one_cache_and_train_as_without_it(table: Path) -> None:
    runs = {
        name: launch(*flags_of(table, name, room, "--data.workers", "1"), folder=table.parent, launcher=CPU_2)
        for name, room in (("plain", 0), ("cached", 1), ("too_large", 1e-5))
    }
    assert {name: run.code for name, run in runs.items()} == dict.fromkeys(runs, 0), runs
    assert runs["cached"].err.count("decoded once") == 1
    assert "decoded in every epoch" in runs["too_large"].err
    expected = losses_of(table.parent / "plain")
    assert len(expected) == 8
    assert losses_of(table.parent / "cached") == losses_of(table.parent / "too_large") == expected
