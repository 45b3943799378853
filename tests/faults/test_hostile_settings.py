"""Hostile settings: no word starts a command, no file or flag runs, imports or takes long to read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from accel_clip.command_line import load_config, parse_config, save_config
from accel_clip.config import Config, ModelConfig
from helpers.patience import within

Train = Callable[..., tuple[int, str]]


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
