"""Hostile input and leaks: nothing that is read runs, leaves its folder or hangs, and no credential is written down."""

from __future__ import annotations

import ast
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from accel_clip import cli
from accel_clip.command_line import load_config, parse_config, save_config
from accel_clip.config import Config, DataConfig, ModelConfig, SourceConfig
from accel_clip.data.bad_samples import BadSample, BadSampleLog, UnusableSample
from accel_clip.data.captions import choose_caption
from accel_clip.data.pictures.decode import decode_picture
from accel_clip.data.sources.base import Source
from accel_clip.data.sources.resolve import open_source
from accel_clip.data.sources.shards.tar_index import build_index, load_index, pack
from accel_clip.data.sources.tables import delimited
from accel_clip.faults import AccelClipError, ConfigError, DataError
from accel_clip.models.build import build_model, tensors_alone
from accel_clip.models.export import exported_model, write_export
from accel_clip.redaction import masked, printable, refuse_credentials
from accel_clip.run.folder import RunFolder
from helpers.commands import ROOT, run, small_model, train_py
from helpers.patience import within

PACKAGE = ROOT / "accel_clip"
TOKEN = "hf_CANARYcanaryCANARYcanaryCANARYcanary"
Train = Callable[..., tuple[int, str]]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """Return a function that runs `train.py` in this process, in a folder of its own: exit code and what it said."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", "--output_dir", "run", *words])
        return cli.train_main(), capsys.readouterr().err

    return call


def picture(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(file)
    return file


def opened(path: Path | str, **settings: Any) -> Source:
    return open_source(str(path), DataConfig(**settings))


def reasons(source: Source) -> list[str]:
    """Return what fetching and decoding every sample comes to, as the loader does it."""
    return [reason_of(lambda index=index: fetch(source, index)) for index in range(len(source))]


def fetch(source: Source, index: int) -> None:
    pair = source[index]
    choose_caption(pair.captions, 0, 0, index)
    decode_picture(pair.image, 50e6)


def reason_of(action: Callable[[], object]) -> str:
    try:
        action()
    except UnusableSample as problem:
        return problem.reason
    return "fine"


# --- weights


class Payload:
    """What writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return open, (str(self.canary), "w")


class Stumble:
    """What torch's careful unpickler fails on with a TypeError, and pickle itself takes."""

    def __reduce__(self) -> tuple:
        return OrderedDict, (), (None, {})


@pytest.mark.parametrize("first", [None, Stumble()], ids=["plain", "stumbling"])
@pytest.mark.parametrize("environment", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}], ids=["default", "unsafe"])
@pytest.mark.parametrize("way", ["pretrained", "folder", "image tower", "text tower"])
def test_pickled_weights_are_never_run(
    way: str, environment: dict[str, str], first: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    canary, name, options, pretrained = tmp_path / "canary", small_model(tmp_path), {}, None
    file = tmp_path / "bad.pt"
    if way == "folder":
        file = tmp_path / "model" / "open_clip_pytorch_model.bin"
        file.parent.mkdir()
        (file.parent / "open_clip_config.json").write_text(f'{{"model_cfg": {Path(name).read_text()}}}')
        name = f"local-dir:{file.parent}"
    elif way == "pretrained":
        pretrained = str(file)
    else:
        options = {f"pretrained_{way.partition(' ')[0]}_path": str(file)}
    torch.save({"first": first, "state_dict": Payload(canary)}, file)
    with pytest.raises(ConfigError, match=r"^model\.(name|pretrained|options)"):
        build_model(ModelConfig(name, pretrained=pretrained, options=options))
    assert not canary.exists()
    assert {key: os.environ.get(key) for key in environment} == environment
    if environment:  # the file does what it is feared for
        torch.load(file)
        assert canary.exists()


def test_no_library_loads_more_than_tensors_while_a_model_is_built(tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "canary"), tmp_path / "bad.pt")
    with tensors_alone(), pytest.raises(Exception, match=r"[Ww]eights.only"):
        torch.load(tmp_path / "bad.pt", weights_only=False)
    assert not (tmp_path / "canary").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_tensors_in_a_pt_file_still_load(tmp_path: Path) -> None:
    name = small_model(tmp_path)
    state = build_model(ModelConfig(name)).clip.state_dict()
    changed = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    torch.save({"epoch": 3, "state_dict": changed}, tmp_path / "good.pt")
    loaded = build_model(ModelConfig(name, pretrained=str(tmp_path / "good.pt"))).clip.state_dict()
    assert all(torch.equal(loaded[key], changed[key]) for key in changed)
    visual = {key.removeprefix("visual."): value for key, value in changed.items() if key.startswith("visual.")}
    torch.save(visual, tmp_path / "visual.pt")
    options = {"pretrained_image_path": str(tmp_path / "visual.pt")}
    loaded = build_model(ModelConfig(name, options=options)).clip.visual.state_dict()
    assert all(torch.equal(loaded[key], visual[key]) for key in visual)


BROKEN = {
    "huge header.safetensors": struct.pack("<Q", 2**60) + b"{}",
    "header past the end.safetensors": struct.pack("<Q", 2**20) + b"{}",
    "deep header.safetensors": struct.pack("<Q", 100_000) + b'{"a":' + b"[" * 99_995,
    "no header.safetensors": struct.pack("<Q", 4) + b"nope",
    "empty.safetensors": b"",
    "empty.pt": b"",
    "text.pt": b"no weights",
    "zip.pt": b"PK\3\4" + b"\0" * 100,
    "empty.npz": b"",
}


@pytest.mark.parametrize("file", BROKEN)
def test_broken_weights_name_themselves_in_one_line(file: str, train: Train, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(BROKEN[file])
    with within(10):
        code, said = train("--model.name", small_model(tmp_path), "--model.pretrained", file)
    lines = [line for line in said.splitlines() if "error" in line]
    assert code == 2 and len(lines) == 1 and "model.pretrained" in lines[0] and file in lines[0], said
    assert "Traceback" not in said and not (tmp_path / "run").exists()


def test_an_export_with_a_huge_header_is_refused(tmp_path: Path) -> None:
    model = build_model(ModelConfig(small_model(tmp_path)))
    folder = tmp_path / "run" / "export"
    folder.parent.mkdir()
    write_export(folder, exported_model(model, {}))
    (folder / "open_clip_model.safetensors").write_bytes(BROKEN["huge header.safetensors"])
    with pytest.raises(ConfigError, match="export"):
        cli.export_command([str(tmp_path / "run")])


def test_a_model_folder_without_weights_is_not_filled_with_random_ones(tmp_path: Path) -> None:
    described = Path(small_model(tmp_path)).read_text()
    (tmp_path / "open_clip_config.json").write_text(f'{{"model_cfg": {described}}}')
    with pytest.raises(ConfigError, match=r"model\.name: 'local-dir:"):
        build_model(ModelConfig(f"local-dir:{tmp_path}"))


# --- descriptions of models, and code that comes with them


ODD = ("[" * 100_000, "[]", "7", "null", '{"embed_dim": 8, "vision_cfg": [], "text_cfg": {}}')


@pytest.mark.parametrize("text", ODD, ids=lambda text: text[:9])
@pytest.mark.parametrize("form", ["json", "folder"])
def test_descriptions_that_are_none_are_refused(form: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(text)
    (tmp_path / "open_clip_config.json").write_text(f'{{"model_cfg": {text}}}')
    name = str(tmp_path / "odd.json") if form == "json" else f"local-dir:{tmp_path}"
    with pytest.raises(AccelClipError, match=r"^model\.name"):
        build_model(ModelConfig(name))


@pytest.mark.parametrize("way", ["json", "folder", "option", "option of the text tower"])
def test_trust_remote_code_cannot_be_set(way: str, tmp_path: Path) -> None:
    plain = json.loads(Path(small_model(tmp_path)).read_text())
    trusting = {**plain, "text_cfg": {**plain["text_cfg"], "tokenizer_kwargs": {"trust_remote_code": True}}}
    (tmp_path / "trusting.json").write_text(json.dumps(trusting))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": trusting}))
    configs = {
        "json": ModelConfig(str(tmp_path / "trusting.json")),
        "folder": ModelConfig(f"local-dir:{tmp_path}"),
        "option": ModelConfig("tiny", options={"trust_remote_code": True}),
        "option of the text tower": ModelConfig("tiny", options={"text_cfg": trusting["text_cfg"]}),
    }
    with pytest.raises(ConfigError, match="trust_remote_code"):
        build_model(configs[way])


def test_code_that_comes_with_a_tokenizer_is_not_run_and_not_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    plain = build_model(ModelConfig(small_model(tmp_path)))
    folder = tmp_path / "model"
    write_export(folder, exported_model(plain, {}))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "org/name"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    code = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", "code.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(code))
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}))
    (folder / "code.py").write_text(f"open({str(canary)!r}, 'w')\nclass Mine: pass\n")
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="not run"):
        build_model(ModelConfig(f"local-dir:{folder}"))
    assert not canary.exists()


# --- words that would start a command


@pytest.mark.parametrize("words", ["pipe:touch canary", " PIPE:touch canary", "touch canary |", "`touch canary`.tar"])
@pytest.mark.parametrize("setting", ["data.train", "data.val", "eval.zero_shot"])
@pytest.mark.parametrize("form", ["flag", "item", "file"])
def test_commands_in_place_of_data_are_refused(
    form: str, setting: str, words: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", "x=pipe:touch canary")
    item = json.dumps({"source": words}) if form == "item" else words
    section, key = setting.split(".")
    (tmp_path / "my.yaml").write_text(f"{section}: {{{key}: {json.dumps(words)}}}")
    code, said = train("--config", "my.yaml") if form == "file" else train(f"--{setting}", item)
    assert code == 2 and setting in said and "would start a command" in said, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.yaml"]


@pytest.mark.parametrize(
    "value",
    [
        "{class_path: os.system, init_args: {command: touch canary}}",
        "{source: demo, class_path: os.system, init_args: {command: touch canary}}",
        "{_target_: os.system, command: touch canary}",
        "{source: demo, trust_remote_code: true}",
    ],
)
@pytest.mark.parametrize("form", ["flag", "file"])
def test_settings_import_nothing(form: str, value: str, train: Train, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(f"data:\n  train: [{value}]\n")
    code, said = train("--config", "my.yaml") if form == "file" else train("--data.train", f"[{value}]")
    assert code in (2, 3) and not (tmp_path / "canary").exists() and not (tmp_path / "run").exists(), said


@pytest.mark.parametrize("section", ["model", "loss", "optim"])
def test_options_that_name_a_class_stay_words(section: str, tmp_path: Path) -> None:
    options = {"class_path": "os.system", "init_args": {"command": f"touch {tmp_path}/canary"}}
    (tmp_path / "my.yaml").write_text(json.dumps({section: {"options": options}}))
    config = load_config(tmp_path / "my.yaml")
    assert getattr(config, section).options == options and not (tmp_path / "canary").exists()


def test_hub_words_that_name_the_reader_of_pickles_are_refused(train: Train) -> None:
    code, said = train("--data.train", "hf:pandas")
    assert code == 3 and "pickled" in said, said


def test_plugins_that_run_are_named(tmp_path: Path, train: Train, own_plugins: None) -> None:
    (tmp_path / "mine.py").write_text("")
    code, said = train("--plugins", "mine.py", "--data.train", "nowhere.csv")
    assert code == 3 and f"plugins: running {tmp_path / 'mine.py'}" in said, said


# --- settings files


def nested_aliases() -> str:
    """Return what stands for 10**9 values in a few lines."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    return "model:\n  options:\n" + "".join(f"    {line}\n" for line in lines)


def nested_aliases_in_a_text() -> str:
    """Return the same in a quoted text, which the parser of settings would read once more."""
    lists = ["&a [x,x,x,x,x,x,x,x,x,x]"]
    lists += [f"&{new} [{','.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    return f'["{lists}"]'.replace("'", "").replace('["', '"').replace('"]', '"')


FILES = {
    "python object": "output_dir: !!python/object/apply:os.system ['touch canary']",
    "python name": "seed: !!python/name:os.system",
    "python module": "seed: !!python/module:this",
    "own tag": "seed: !mine 1",
    "twice": "optim: {lr: 1e-3, lr: 1e-4}",
    "twice in options": "loss: {options: {a: 1, a: 2}}",
    "twice in an item": "data: {train: [{source: demo, source: x}]}",
    "aliases": nested_aliases(),
    "alias of itself": "model: {options: &a {x: *a}}",
    "aliases in a text for a number": f"optim: {{lr: {nested_aliases_in_a_text()}}}",
    "aliases in a text for a dictionary": f"model: {{options: {nested_aliases_in_a_text()}}}",
    "aliases in a text for a list": f"data: {{caption_key: {nested_aliases_in_a_text()}}}\noptim: {{lr: -1}}",
    "deep": "model: {options: {a: " + "[" * 50_000 + "]" * 50_000 + "}}",
    "deep text": 'model: {options: "' + "[" * 50_000 + '"}',
    "many keys twice": "loss: {options: {" + ", ".join(f"k{n}: 1" for n in range(9000)) + ", k1: 1}}",
    "no calendar date": "loss: {options: {a: 2026-13-45}}",
    "control character": "seed: \x00",
    "no utf-8": b"output_dir: \xff",
    "binary": bytes(range(256)) * 4,
    "50 MB": b"# comment\n" * 5_000_000,
    "50 MB of one line": b"output_dir: " + b"x" * 50_000_000,
}


@pytest.mark.parametrize("kind", FILES)
def test_hostile_settings_files_are_refused_quickly(kind: str, train: Train, tmp_path: Path) -> None:
    content = FILES[kind]
    (tmp_path / "my.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with within(5):
        code, said = train("--config", "my.yaml")
    assert code == 2 and len(said.strip().splitlines()) == 1 and len(said) < 2000, said[:2000]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.yaml"]


def test_flags_that_nest_deeply_or_hold_aliases_are_refused(train: Train) -> None:
    for words in (
        ["--model.options", "{a: " + "[" * 20_000 + "]" * 20_000 + "}"],
        ["--optim.lr", nested_aliases_in_a_text().strip('"')],
    ):
        with within(20):
            code, said = train(*words)
        assert code == 2 and len(said.strip().splitlines()) == 1, said[:2000]


def test_words_with_stars_and_ampersands_stay_words(tmp_path: Path) -> None:
    words = ["--data.train", "[R&D/*.csv, '*x']", "--model.freeze", "*.bias", "--output_dir", "a&b *c"]
    config = parse_config(words, "train.py", "")
    assert config.data.train == ["R&D/*.csv", "*x"] and config.model.freeze == ["*.bias"]
    assert config.output_dir == "a&b *c"
    shared = {"x": [1, 2]}
    again = Config(model=ModelConfig(options={"one": shared, "two": shared}))
    save_config(again, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == again


# --- paths that leave their folder

OPENED: list[str] = []
RECORDING: list[bool] = []


def record(event: str, arguments: tuple) -> None:
    if RECORDING and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, os.PathLike)):
        OPENED.append(os.path.realpath(arguments[0]))


sys.addaudithook(record)


@contextmanager
def nothing_opened_in(folder: Path) -> Iterator[None]:
    """Fail when any file below a folder is opened, whichever library does it."""
    OPENED.clear()
    RECORDING.append(True)
    try:
        yield
    finally:
        RECORDING.clear()
    assert OPENED, "nothing was recorded"
    assert not [path for path in OPENED if Path(path).is_relative_to(folder.resolve())]


@pytest.mark.parametrize("form", ["pairs.csv", "pairs.tsv", "pairs.jsonl", "pairs.parquet", "metadata.csv"])
def test_pictures_outside_of_the_folder_are_counted_and_never_opened(form: str, tmp_path: Path) -> None:
    inside, secret = tmp_path / "data", tmp_path / "secret"
    picture(inside / "fine.png"), picture(secret / "a.png")
    (inside / "link.png").symlink_to(secret / "a.png")
    (inside / "folder").symlink_to(secret)
    (inside / "twice.png").symlink_to(inside / "link.png")
    (inside / "passwd.png").symlink_to("/etc/passwd")
    cells = [
        *("../secret/a.png", "../../../../../../../../etc/passwd", "/etc/passwd", str(secret / "a.png")),
        *("link.png", "folder/a.png", "twice.png", "passwd.png", "./x/../../secret/a.png", "..\\secret\\a.png"),
        *("fine.png", "nowhere.png", "folder/../fine.png"),
    ]
    write_table(inside / form, cells)
    source = opened(inside if form == "metadata.csv" else inside / form)
    with nothing_opened_in(secret):
        found = reasons(source)
    # the last leads through a link: up from where the link points to, where no fine.png lies
    assert found == ["outside_root"] * 10 + ["fine", "missing_file", "outside_root"]
    source = opened(inside if form == "metadata.csv" else inside / form, image_root="/")
    assert reasons(source)[3] == "fine" and reasons(source)[2] == "unreadable"


def write_table(file: Path, cells: list[str]) -> None:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps({"image": cell, "caption": "x"}) + "\n" for cell in cells))
    elif file.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"image": cells, "caption": ["x"] * len(cells)}), file)
    else:
        separator = "\t" if file.suffix == ".tsv" else ","
        name = "file_name" if file.stem == "metadata" else "image"
        file.write_text(f"{name}{separator}caption\n" + "".join(f"{cell}{separator}x\n" for cell in cells))


def test_captions_and_pictures_of_folders_outside_are_counted_and_never_opened(tmp_path: Path) -> None:
    inside, secret = tmp_path / "data", tmp_path / "secret"
    picture(secret / "a.png")
    (secret / "words.txt").write_bytes("ein schönes Geheimnis".encode("cp1252"))
    for name in ("1", "2", "3"):
        picture(inside / f"{name}.png")
        (inside / f"{name}.txt").write_text(name)
    (inside / "2.txt").unlink()
    (inside / "2.txt").symlink_to(secret / "words.txt")
    (inside / "3.png").unlink()
    (inside / "3.png").symlink_to(secret / "a.png")
    with nothing_opened_in(secret):
        found = reasons(opened(inside))
    assert found == ["fine", "outside_root", "outside_root"]
    assert reasons(opened(inside, image_root=str(tmp_path))) == ["fine", "fine", "fine"]


def test_links_to_the_whole_disk_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "data"
    picture(folder / "1.png")
    (folder / "1.txt").write_text("one")
    (folder / "root").symlink_to("/")
    (folder / "up").symlink_to(tmp_path)
    picture(tmp_path / "other.png")
    with within(10):
        assert len(opened(folder)) == 1


def test_pipes_in_place_of_files_are_not_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    picture(folder / "fine.png")
    for name in ("fine.txt", "pipe.txt", "pipe2.txt"):
        (folder / name).write_text("x")
    os.mkfifo(folder / "pipe.png")
    picture(folder / "pipe2.png")
    (folder / "pipe2.txt").unlink()
    os.mkfifo(folder / "pipe2.txt")
    with within(10):
        assert reasons(opened(folder)) == ["fine", "missing_file", "no_caption"]
        write_table(folder / "pairs.csv", ["pipe.png", "fine.png"])
        assert reasons(opened(folder / "pairs.csv")) == ["missing_file", "fine"]


def test_members_of_shards_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["../../escape", "/tmp/escape", "a/../../../escape"]
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in names:
            add(archive, f"{name}.png", png(4, 4))
            add(archive, f"{name}.txt", b"x")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        add(archive, "link.txt", b"x")
    before = {path.name for path in tmp_path.parent.iterdir()}
    assert reasons(opened(tmp_path / "x.tar")) == ["fine", "fine", "fine", "missing_file"]
    assert {path.name for path in tmp_path.parent.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"x.tar", "x.tar.accel-clip-index"}


# --- headers and cells that claim too much


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def png(width: int, height: int) -> bytes:
    """Return a PNG that claims a size; without pixels when it is not small."""
    if width * height < 1000:
        buffer = io.BytesIO()
        Image.new("RGB", (width, height), "red").save(buffer, "PNG")
        return buffer.getvalue()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    parts = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_small_file_of_a_hundred_million_pixels_is_skipped_at_once(tmp_path: Path) -> None:
    bomb = png(10_000, 10_000)
    assert len(bomb) < 20_000
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a.png", bomb)
        add(archive, "a.txt", b"x")
    (tmp_path / "a.png").write_bytes(bomb)
    write_table(tmp_path / "pairs.csv", ["a.png"])
    with within(1):
        assert reasons(opened(tmp_path / "x.tar")) + reasons(opened(tmp_path / "pairs.csv")) == ["too_large"] * 2


@pytest.mark.parametrize("size", [2**63 - 1, 2**62, 2**61, 2**40])
@pytest.mark.parametrize("form", ["base-256", "pax"])
@pytest.mark.parametrize("extension", ["png", "txt", "json"])
def test_members_that_claim_exabytes_cost_nothing(form: str, size: int, extension: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "a.png", png(4, 4))
        add(archive, "a.txt", b"x")
        if extension != "png":
            add(archive, "b.png", png(4, 4))
    written = (tmp_path / "x.tar").read_bytes().rstrip(b"\0")
    written += bytes(-len(written) % 512)
    member = tarfile.TarInfo(f"b.{extension}")
    member.size = size
    if form == "base-256":
        header = member.tobuf(tarfile.GNU_FORMAT)
    else:
        header = member.tobuf(tarfile.PAX_FORMAT)
        assert b"size=" in header
    (tmp_path / "x.tar").write_bytes(written + header)
    with within(10):
        assert reasons(opened(tmp_path / "x.tar"))[0] == "fine"
        assert "fine" not in reasons(opened(tmp_path / "x.tar"))[1:] or extension == "json"


@pytest.mark.parametrize("digits", ["9" * 30, "9" * 5000, "-1", "1e9", ""])
def test_sizes_in_extended_headers_that_are_no_sizes_end_a_shard(digits: str, tmp_path: Path) -> None:
    record = f" size={digits}\n".encode()
    length = len(record) + 1
    while len(str(length)) + len(record) != length:
        length += 1
    content = str(length).encode() + record
    extended = tarfile.TarInfo("x")
    extended.type, extended.size = tarfile.XHDTYPE, len(content)
    member = tarfile.TarInfo("b.png")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a.png", png(4, 4))
        add(archive, "a.txt", b"x")
        archive.addfile(extended, io.BytesIO(content))
        archive.addfile(member)
    index = build_index(tmp_path / "x.tar")
    assert index.num_samples == 1 and "extended header" in (index.problem or "")
    assert reasons(opened(tmp_path / "x.tar")) == ["fine"]


def test_an_index_that_points_past_its_samples_is_made_anew(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "a.png", png(4, 4))
        add(archive, "a.txt", b"x")
    index = build_index(tmp_path / "x.tar")
    index.members["sample"][0] = 7
    (tmp_path / "x.tar.accel-clip-index").write_bytes(pack(index))
    assert load_index(tmp_path / "x.tar") is None
    assert reasons(opened(tmp_path / "x.tar")) == ["fine"]


@pytest.mark.parametrize("depth", [300, 600, 950, 30_000])
def test_records_and_rows_that_nest_deeply_cost_themselves_alone(depth: int, tmp_path: Path) -> None:
    deep = "[" * depth + '"x"' + "]" * depth
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, record in (("a", '{"caption": "x"}'), ("b", f'{{"caption": {deep}}}'), ("c", "[" * depth)):
            add(archive, f"{name}.png", png(4, 4))
            add(archive, f"{name}.json", record.encode())
    found = reasons(opened(tmp_path / "x.tar"))
    assert found[0] == "fine" and found[1] in ("fine", "caption_encoding") and found[2] == "caption_encoding"
    picture(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_text(f'{{"image": "a.png", "caption": {deep}}}\n')
    try:
        assert reasons(opened(tmp_path / "pairs.jsonl")) == ["fine"]
    except DataError as error:
        assert "line 1" in str(error)


def test_a_caption_of_ten_megabytes_is_skipped_fast_from_every_source(tmp_path: Path) -> None:
    long, folder = "x " * 5_000_000, tmp_path / "folder"
    for name in ("a", "b"):
        picture(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(long if name == "a" else "fine")
    rows = [("folder/a.png", long), ("folder/b.png", "fine")]
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(f"{image},{text}\n" for image, text in rows))
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"image": image, "caption": text}) + "\n" for image, text in rows)
    )
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, text in (("a", long), ("b", "fine")):
            add(archive, f"{name}.png", png(4, 4))
            add(archive, f"{name}.txt", text.encode())
    for path in (folder, tmp_path / "pairs.csv", tmp_path / "pairs.jsonl", tmp_path / "x.tar"):
        source = opened(path)
        with within(1):
            assert reasons(source) == ["caption_too_large", "fine"], path


def test_cells_and_lines_without_end_are_told_with_their_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")
    too_long = "x" * ((1 << 24) + 1)
    (tmp_path / "cell.csv").write_text(f"image,caption\na.png,fine\na.png,{too_long}\n")
    with within(20), pytest.raises(DataError, match=r"cell\.csv: the row that begins in line 3 cannot be read"):
        opened(tmp_path / "cell.csv")
    (tmp_path / "quote.csv").write_text('image,caption\na.png,"' + ("a.png,fine\n" * (1 << 21)))
    with within(20), pytest.raises(DataError, match=r"quote\.csv: the row that begins in line 2 cannot be read"):
        opened(tmp_path / "quote.csv")
    monkeypatch.setattr(delimited, "LONGEST_LINE", 1000)
    for name, content in (
        ("line.csv", "image,caption\n" + "a.png,x\n" * 3 + "y" * 1001),
        ("line.jsonl", '{"image": "a.png", "caption": "x"}\n' * 4 + "y" * 1001),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"{name}: line 5 has more than"):
            opened(tmp_path / name)


# --- credentials

SIGNED = "https://bucket.s3.amazonaws.com/{0..9}.tar?X-Amz-Credential=AKIACANARY&X-Amz-Signature=CANARY0123"
SECRETS = {
    "data.train": ["--data.train", SIGNED],
    "an item of data.train": ["--data.train", f"[demo, {{source: {json.dumps(SIGNED)}}}]"],
    "data.val": ["--data.val", "https://me:CANARY@example.org/x.tar"],
    "data.image_root": ["--data.image_root", "s3://key:CANARY@bucket/x"],
    "output_dir": ["--output_dir", f"runs/{TOKEN}"],
    "eval.zero_shot": ["--eval.zero_shot", "https://example.org/x.tar?sig=CANARY&se=2027"],
    "model.options": ["--model.options", "{token: CANARY}"],
    "model.name": ["--model.name", "https://CANARY@example.org/model.json"],
    "loss.options": ["--loss.options", "{teachers: [{name: tiny, options: {hf_token: CANARY}}]}"],
    "a value of the environment": ["--data.train", "/mnt/CANARYsecretCANARY/x.csv"],
    "a word that is no setting": ["--data.trian", SIGNED],
    "a wrong value": ["--optim.lr", SIGNED],
}


ADDRESS = "https://example.org/0.tar"
NAMED = [
    *("?pwd=", "?pass=", "?jwt=", "?sessionid=", "?sas=", "?bearer=", "#access_token=", ";token=", "?%74oken="),
    *("?hdnts=", "?a=b&password=", "?Pass-Word=", "?user.passwd=", "?API-Key=", "?apiKey=", "?x-api_key="),
    *("?accessToken=", "?sid=", "?%2574oken=", "?T%4fKEN=", "%3Ftoken=", "?x%26token%3D"),
    *("?next=https%3A%2F%2Fh%2F%3Fsig%3D", "?u=http://h/?jwt=", "?X-Amz-Signature=", "?X-Amz-Security-Token="),
    *("?AWSAccessKeyId=", "?Signature=", "?X-Goog-Signature=", "?sig=", "?sv=2024-01-01&se=2027&sig="),
    *("?OSSAccessKeyId=", "?q-signature=", "?hdnea=exp=1~hmac=", "?hdntl=", "?__token__=", "?auth_token="),
    *("?oauth_token=", "?refresh_token=", "?id_token=", "?client_secret=", "?PHPSESSID=", "?JSESSIONID="),
    *(";jsessionid=", "#token=", "#a=b&id_token=", "?authorization=", "?key=", "?credential=", "?passphrase="),
    *("?token2=", "?auth=", "?private_key=", "?AccountKey=", ";SharedAccessSignature=", "&amp;token="),
    "?auth[token]=",
]
"""Each followed by a credential of any form."""

LETTERS = "CANARY0123canaryCANARY4567canaryCANARY89"
TOKENS = [
    *("github_pat_" + LETTERS, "ghp_" + LETTERS[:36], "ghr_" + LETTERS[:36], "glpat-" + LETTERS[:20]),
    *("gldt-" + LETTERS[:20], "xoxb-123456789012-123456789012-" + LETTERS[:24], "xoxp-1-" + LETTERS),
    *("xapp-1-A0-" + LETTERS, "sk-proj-" + LETTERS, "sk-ant-api03-" + LETTERS, "sk-" + LETTERS),
    *("npm_" + LETTERS[:36], "AIzaSy" + LETTERS[:33], "api_org_" + LETTERS[:34], "wandb_v1_" + LETTERS),
    *("hf_" + LETTERS[:34], "AKIACANARY0123456789", "ASIACANARY0123456789", "pypi-AgEIcHlwaS5vcmcCJ" + LETTERS),
    *("dckr_pat_" + LETTERS[:27], "sk_live_" + LETTERS[:24], "hvs." + LETTERS),
    *("SG." + LETTERS[:22] + "." + LETTERS, "gsk_" + LETTERS, "nvapi-" + LETTERS, "123456789:AA" + LETTERS[:33]),
    *("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJDQU5BUlkifQ." + LETTERS, "ya29." + LETTERS, "LTAI" + LETTERS[:20]),
    *("Bearer " + LETTERS, "Authorization: Basic " + LETTERS, "https://" + LETTERS + "@h/x"),
    "//me:" + LETTERS + "@h/x",
    "-----BEGIN OPENSSH PRIVATE KEY-----\n" + LETTERS + "\n-----END OPENSSH PRIVATE KEY-----",
]


@pytest.mark.parametrize("text", [*(f"{ADDRESS}{name}CANARY01" for name in NAMED), *TOKENS])
def test_credentials_are_known_by_their_names_and_forms(text: str) -> None:
    for written in (text, f"runs/x_{text}", f"({text})", f"an error about '{text}' and more"):
        shown = masked(written)
        assert "CANARY" not in shown and "***" in shown and masked(shown) == shown, shown
    for settings in ({"data": {"train": [text]}}, {"model": {"options": {"a": {text: 1}}}}, {"output_dir": text}):
        with pytest.raises(ConfigError, match="it holds a credential") as caught:
            refuse_credentials(settings)
        assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["pwd", "pass", "jwt", "sas_token", "apiKey", "API-KEY", "hfToken", "github.token", "user_pwd"]
)
def test_options_are_known_by_their_names(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.options\..*it holds a credential"):
        refuse_credentials({"model": {"options": {name: "CANARY"}}})


ORDINARY = [
    *(
        "s3://bucket/tokens/pass.csv",
        "data/sk-learn/train.csv",
        "sk-ant-colony-simulation",
        "xoxo-lettering-pictures",
        "sk-learn-pipelines-for-pictures/x.csv",
    ),
    *("hf_datasets/x.csv", "https://h/0.tar?token_count=5", "https://h/0.tar?max_tokens=77&bypass=1"),
    *("https://h/0.tar?compass=n&sort_key=a", "https://h/0.tar?author=me&design=3&monkey=1&signal=x"),
    *("https://h/0.tar?sasha=1&passage=2&session=3&keys=4", "https://h/a%20b/0.tar"),
    *("https://h/100%25/0.tar?x=%E9%9D%92%E8%9B%99", "50% off", "a photo of 100%", "/data/%d.jpg"),
    *("ViT-B-16-SigLIP2", "hf-hub:timm/ViT-B-16-SigLIP", "laion2b_s34b_b79k"),
    *("vit_base_patch16_siglip_224.v2_webli", "npm_packages", "npm_and_yarn_logos/x.csv", "glpat", "xoxb"),
    *("wandb_v1", "api_org_chart.csv", "AIza", "github_pat_/x", "3f786850e387550fdab836ed7e6dc881de23001b"),
    *("sha256:" + "0123456789abcdef" * 4, "5eb63bbbe01eeed093cb22bb8f5acdc3"),
    *("123e4567-e89b-12d3-a456-426614174000", "/home/AC0123456789abcdef0123456789abcdef/x.jpg"),
    *("key-0123456789abcdef", "images/0123456789abcdef0123456789abcdef-us1.jpg", "runs/2024-01-01T12:00:00"),
    *("1234567890:2024-01-01", "00000.tar", "the basic transformation-based approach", "a token of love"),
    *("the bearer misunderstandings", "secret garden: a frog", "password=none of it stands in an address"),
    *("shards/{0000..0041}.tar", "pipe:x; sort --key=2", "hf:org/name:train[:10%]", "git@github.com:org/name"),
    *("C:/x//y", "http://[::1]:80/x.tar", "a#b", "x;y=z", "青蛙?的=图", "eyJx.eyJy.z", "SG.x.y"),
    *("TRANSFORMERS_AND_TOKENIZERS", "AKIAhabara/x.jpg", "data/ASIA/INDIA/x.jpg", "Bearer", "Authorization", "?"),
    *("=", "&&=="),
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_words_are_no_credentials(text: str) -> None:
    assert masked(text) == text
    refuse_credentials({"data": {"train": [text], "caption_key": {text: 1.0}}, "output_dir": text})


@pytest.mark.parametrize(
    "name", ["pass_through", "class_token", "token_count", "key", "passes", "author", "num_passes", "signal"]
)
def test_ordinary_options_are_no_credentials(name: str) -> None:
    refuse_credentials({"model": {"options": {name: "x"}}})


def test_masking_takes_no_longer_than_reading() -> None:
    for piece in ("x", "?a=b", "%41", "eyJ", "?%74", "//a:", "-----BEGIN PRIVATE KEY-----", "sk-", "&" * 9, "a://"):
        with within(2):
            masked(piece * (100_000 // len(piece)))


def test_credentials_in_data_do_not_reach_checkpoints(tmp_path: Path) -> None:
    log = BadSampleLog(tmp_path / "bad_samples.jsonl", 1.0)
    bad = BadSample(f"{SIGNED}", f"{SIGNED}/17", "missing_file", 'a"b%22?%74oken=CANARY', TOKENS[0], 0)
    log.meet((bad, bad), 2)
    log.collect(Alone())
    written = log.file.read_text() + json.dumps(log.state_dict())
    assert "CANARY" not in written and log.counts == {"missing_file": 1}
    assert json.loads(log.file.read_text())["path"] == 'a"b"?token=***'
    other = BadSampleLog(tmp_path / "bad_samples.jsonl", 1.0)
    other.load_state_dict(log.state_dict())
    other.meet((bad,), 1)
    other.collect(Alone())
    assert other.counts == {"missing_file": 1}


def test_a_traceback_shows_no_credential(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise LookupError(f"no answer from {SIGNED}")

    assert cli.guarded(broken) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "LookupError: no answer from https://bucket" in said and "CANARY" not in said


class Alone:
    """What the log needs of an accelerator, in one process."""

    is_main_process = True


@pytest.mark.parametrize("setting", SECRETS)
def test_settings_with_credentials_are_refused_and_not_repeated(
    setting: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARYsecretCANARY")
    code, said = train(*SECRETS[setting])
    assert code == 2 and len(said.strip().splitlines()) == 1, said
    assert "CANARY" not in said and (setting in said or " " in setting), said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"data": {"train": ["hf:org/name:train[:10%]", "shards/{0000..0041}.tar", "hf_datasets/x.csv", "s3 ://x@y"]}},
        {"model": {"options": {"class_token": True, "max_tokens": 77, "pad_token": "<pad>", "key": "x"}}},
        {"output_dir": "runs/what?design=3&monkey=1", "data": {"image_key": "key", "caption_key": ["token"]}},
        {"eval": {"templates": ["a photo of a {}, a token of love."]}, "plugins": ["tokens/my_secret.py"]},
    ],
)
def test_ordinary_settings_hold_no_credentials(settings: dict[str, Any]) -> None:
    refuse_credentials(settings)


def test_credentials_are_masked_in_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "CANARY0123456789abcdef")
    text = f"{SIGNED} https://me:CANARY@host/x {TOKEN} CANARY0123456789abcdef"
    assert "CANARY" not in masked(text) and masked(text).count("***") >= 4
    assert masked(masked(text)) == masked(text)
    assert "https://bucket.s3.amazonaws.com/" in masked(text) and "host/x" in masked(text)
    folder = RunFolder(tmp_path)
    folder.write_status("failed", 3, 1, f"OSError: {text}")
    line = BadSample("pairs.csv", 3, "missing_file", text, f"no {text}", 0).line()
    assert "CANARY" not in folder.status.read_text() + line and json.loads(line)["sample"] == 3
    from accel_clip import console

    console.say(text)
    console.error(f"\x1b]0;title\x07\x1b[2J{text}\n")
    said = capsys.readouterr().err
    assert "CANARY" not in said and "\x1b" not in said and "\\x1b[2J" in said
    assert printable("两行\n\tüber") == "两行\n\tüber"


@pytest.mark.slow
def test_no_credential_of_environment_or_data_reaches_the_run_folder(tmp_path: Path) -> None:
    for number in range(40):
        picture(tmp_path / f"{number}.png")
    rows = "".join(f"{number}.png,a red picture {number}\n" for number in range(40))
    (tmp_path / "pairs.csv").write_text(f"image,caption\n{rows}{SIGNED},signed\n")
    words = ["--model.name", small_model(tmp_path), "--data.train", "pairs.csv", "--output_dir", "run"]
    words += ["--train.batch_size", "8", "--train.steps", "12", "--data.workers", "1", "--data.max_bad_fraction", "1"]
    secrets = {
        "HF_TOKEN": TOKEN,
        "WANDB_API_KEY": "CANARY2" * 6,
        "AWS_ACCESS_KEY_ID": "AKIACANARYCANARYCANA",
        "AWS_SECRET_ACCESS_KEY": "CANARY3" * 6,
        "AWS_SESSION_TOKEN": "CANARY4" * 6,
    }
    done = train_py(*words, "--data.val_fraction", "0", folder=tmp_path, **secrets)
    assert done.code == 0, done.err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "STATUS.json", "bad_samples.jsonl"} <= {path.name for path in files}
    assert any("tfevents" in path.name for path in files)
    assert "missing_file" in (tmp_path / "run" / "bad_samples.jsonl").read_text()
    leaks = [path for path in files if b"CANARY" in path.read_bytes()]
    assert not leaks and "CANARY" not in done.err + done.out


# --- without a network


def unshared(*words: str, folder: Path, **environment: str) -> Any:
    """Run a command that sees no network at all."""
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("unshare is not permitted here")
    return run("unshare", "-rn", *words, folder=folder, **environment)


@pytest.mark.slow
def test_the_demo_runs_without_a_network(tmp_path: Path) -> None:
    words = ["--output_dir", "run", "--train.steps", "2", "--train.batch_size", "16", "--data.workers", "0"]
    python = (sys.executable, str(ROOT / "train.py"))
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = unshared(*python, *words, "--model.name", small_model(tmp_path), folder=tmp_path, **home)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "STATUS.json").read_text())["state"] == "complete"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--model.name", "hf-hub:org/name"], "hf-hub:org/name"),
        (["--model.name", "ViT-B-32", "--model.pretrained", "laion2b_s34b_b79k"], "laion2b_s34b_b79k"),
        (["--data.train", "hf:org/name"], "hf:org/name"),
        (["--data.train", "hf-stream:org/name"], "hf-stream:org/name"),
        (["--data.train", "https://example.org/{0000..0041}.tar"], "https://example.org/0000.tar: 3 attempts"),
    ],
)
def test_hub_names_without_a_network_fail_soon(words: list[str], name: str, tmp_path: Path) -> None:
    python = (sys.executable, str(ROOT / "train.py"), "--output_dir", "run")
    done = unshared(*python, *words, folder=tmp_path, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0")
    errors = [line for line in done.err.splitlines() if line.startswith("accel-clip: error")]
    assert done.code == 3 and len(errors) == 1 and name in errors[0], done.err
    assert not (tmp_path / "run").exists()


# --- the package itself

UNPICKLERS = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
DANGEROUS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load", "input"}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def given(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == name), None)


def problems_of(source: str, room: str = "") -> list[str]:
    """Return what in a module could run code that somebody else wrote."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [
            f"imports {name}" for name in names if name.split(".")[0] in UNPICKLERS and room != "models/weights.py"
        ]
        if isinstance(node, ast.Attribute) and ast.unparse(node) not in ("pickle.UnpicklingError",):
            found += [ast.unparse(node)] if ast.unparse(node).split(".")[0] in UNPICKLERS else []
    for name, call in calls(tree):
        if name == "torch.load" and given(call, "weights_only") != "True":
            found.append("torch.load without weights_only")
        if name.endswith((".load", "load_dataset", "from_pretrained")):
            found += [key for key in ("allow_pickle", "trust_remote_code") if given(call, key) not in (None, "False")]
        if name.startswith("yaml.") and ("unsafe" in name or "full_load" in name):
            found.append(name)
        if name == "yaml.load" and given(call, "Loader") != "UniqueKeyLoader":
            found.append("yaml.load with another loader")
        if name in DANGEROUS or given(call, "shell") not in (None, "False"):
            found.append(name)
        if name == "importlib.import_module" and room not in ("__init__.py", "data/sources/resolve.py"):
            found.append(name)
        if name.endswith("exec_module") and room != "plugins.py":
            found.append(name)
        if name in ("Accelerator.load_state", "accelerator.load_state", "accelerator.register_for_checkpointing"):
            found.append(name)
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_module_runs_what_it_reads(file: Path) -> None:
    assert problems_of(file.read_text(encoding="utf-8"), file.relative_to(PACKAGE).as_posix()) == []


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from pickle import load", "import shelve", "pickle.loads(x)", "torch.load(x)"),
        *("torch.load(x, weights_only=False)", "numpy.load(x, allow_pickle=True)", "yaml.unsafe_load(x)"),
        *("yaml.load(x, Loader=yaml.Loader)", "eval(x)", "exec(x)", "os.system(x)", "subprocess.run(x, shell=True)"),
        *("AutoModel.from_pretrained(x, trust_remote_code=True)", "accelerator.load_state(x)"),
    ],
)
def test_what_runs_code_would_be_found(code: str) -> None:
    assert problems_of(code)


def test_readers_of_arrays_refuse_objects(tmp_path: Path) -> None:
    numpy.save(tmp_path / "x.npy", numpy.array([Payload(tmp_path / "canary")], object), allow_pickle=True)
    with pytest.raises(ConfigError, match=r"model\.pretrained"):
        build_model(ModelConfig(small_model(tmp_path), pretrained=str(tmp_path / "x.npy")))
    assert not (tmp_path / "canary").exists()


def test_documents_never_suggest_to_open_tensorboard_to_the_world() -> None:
    pages = [page for kind in ("*.md", "*.ipynb", "*.yaml", "*.py") for page in ROOT.rglob(kind)]
    hidden = [page for page in pages if any(part.startswith(".") for part in page.relative_to(ROOT).parts)]
    pages = [page for page in pages if page != Path(__file__).resolve() and page not in hidden]  # .venv, .git
    assert ROOT / "README.md" in pages
    assert not [page for page in pages if "bind_all" in page.read_text(encoding="utf-8")]


def test_items_of_sources_take_no_further_keys() -> None:
    assert set(SourceConfig.__dataclass_fields__) <= {"source", "weight", "image_key", "caption_key", "image_root"}
