"""Settings from files and flags: what wins, what is refused, and in which words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from accel_clip.command_line import known_keys, load_config, parse_config, save_config
from accel_clip.config import Config, DataConfig, SourceConfig
from accel_clip.faults import ConfigError


def parse(*words: str) -> Config:
    return parse_config(list(words), "train.py", "")


def test_flags_win_over_files_and_later_files_over_earlier_ones(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed: 1\noptim: {lr: 1e-3, weight_decay: 0.1}\ntrain: {epochs: 3}\n")
    second.write_text("optim: {lr: 2e-3}\n")
    config = parse("--train.epochs", "7", "--config", str(first), f"--config={second}")
    assert (config.seed, config.optim.lr, config.optim.weight_decay, config.train.epochs) == (1, 2e-3, 0.1, 7)


def test_a_list_key_takes_one_bare_value_from_flag_and_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("data: {train: 照片.csv, caption_key: title}\nplugins: mine.py\n")
    config = parse("--config", str(file), "--track.to", "wandb")
    assert config.data.train == ["照片.csv"]
    assert config.data.caption_key == ["title"]
    assert config.plugins == ["mine.py"]
    assert config.track.to == ["wandb"]
    assert parse("--track.to", "[]").track.to == []
    sources = parse("--data.train", "[a.csv, {source: b.csv, caption_key: [x, y]}]").data.train
    assert sources == ["a.csv", SourceConfig("b.csv", caption_key=["x", "y"])]


def test_captions_have_weights_in_flags_files_and_items_and_the_last_word_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(
        "data:\n  caption_key: {title: 1, alt: 3}\n  train: [{source: b.csv, caption_key: {x: 2, y: 1}}]\n"
    )
    second.write_text("data: {caption_key: {alt: 0.5}}\n")
    config = parse("--config", str(first))
    assert config.data.caption_key == {"title": 1.0, "alt": 3.0}
    assert config.data.train == [SourceConfig("b.csv", caption_key={"x": 2.0, "y": 1.0})]
    for flags in (["--data.caption_key", "{title: 1, alt: 3}"], ["--data.caption_key={title: 1, alt: 3}"]):
        assert parse(*flags).data.caption_key == {"title": 1.0, "alt": 3.0}
        assert parse("--config", str(second), *flags).data.caption_key == {"title": 1.0, "alt": 3.0}
    assert parse("--config", str(first), "--config", str(second)).data.caption_key == {"alt": 0.5}
    assert parse("--config", str(first), "--data.caption_key", "title").data.caption_key == ["title"]
    assert parse("--config", str(first), "--data.caption_key", "[title, alt]").data.caption_key == ["title", "alt"]
    assert parse("--config", str(first), "--data.caption_key", "null").data.caption_key is None
    sources = parse("--data.train", "[{source: b.csv, caption_key: x}]").data.train
    assert sources == [SourceConfig("b.csv", caption_key="x")]
    for saved in (config, parse("--data.train", "[{source: b.csv, caption_key: x}]")):
        save_config(saved, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == saved


def test_saved_settings_load_back(tmp_path: Path) -> None:
    data = DataConfig(train=["a.csv", SourceConfig("b: [c].csv")], val=["图.tsv"], caption_key=["null", "1e3"])
    config = replace(Config(data=data), seed=3, output_dir="runs/ü")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--data.trian", "x"], ["data.trian", "data.train"]),
        (["--lrr", "1"], ["lrr", "optim.lr"]),
        (["--optim.l", "1"], ["optim.l"]),  # an abbreviation is not a key
        (["--optim.lr", "abc"], ["optim.lr", "float", "abc"]),
        (["--optim.lr", "0"], ["optim.lr", "above 0"]),
        (["--optim.lr", "inf"], ["optim.lr", "inf"]),
        (["--train.steps", "2.5"], ["train.steps", "int", "2.5"]),
        (["--train.epochs", "-1"], ["train.epochs", "-1", "at least 1"]),
        (["--train.batch_size", "1"], ["train.batch_size", "at least 2"]),
        (["--train.precision", "int8"], ["train.precision", "int8", "bf16"]),
        (["--stop.patience", "3"], ["stop.patience", "stop.metric"]),
        (["--eval.templates", "a photo"], ["eval.templates", "{}"]),
        (["--data.caption_key", "{title: 0}"], ["data.caption_key.title", "above 0"]),
        (["--data.caption_key", "{title: .inf}"], ["data.caption_key.title", "inf"]),
        (["--data.caption_key", "{title: often}"], ["data.caption_key", "float", "often"]),
        (["--data.caption_key", "{3: 1}"], ["data.caption_key", "3", "quotes"]),
        (["--data.caption_key.title", "1"], ["data.caption_key.title", "did you mean", "data.caption_key"]),
        (["--data.caption_kye", "{title: 1}"], ["did you mean", "data.caption_key"]),
        (["--data.train", "[{source: x, caption_key: {title: -1}}]"], ["data.caption_key.title", "above 0"]),
        (["--seed"], ["seed", "expected one argument"]),
        (["photos.csv"], ["photos.csv", "--key value"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    ],
)
def test_a_wrong_flag_names_itself_and_the_way_out(words: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("data: {trian: x}", ["data.trian", "data.train"]),
        ("data: x.csv", ["'data' is a section"]),
        ("seed: 1\nseed: 2", ["'seed' stands twice"]),
        ("optim: {lr: fast}", ["optim.lr", "fast"]),
        ("output_dir: !!python/object/apply:os.getcwd []", ["python/object"]),
        ("- a\n- b", ["must hold settings"]),
    ],
)
def test_a_wrong_file_names_itself(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse("--config", str(file))
    assert all(part in str(caught.value) for part in parts), caught.value


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for key in known_keys():
        rest = text.partition(f"--{key} ")[2] or text.partition(f"--{key}+")[2]
        explanation = rest.partition("(type:")[0]
        assert len(explanation.split()) > 3, f"{key} has no help"
        assert "default:" in rest.partition("(type:")[2][:200], key
