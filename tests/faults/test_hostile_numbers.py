"""Numbers that no setting can take: every one is told in one line, at once, with its key and its range."""

from __future__ import annotations

import json
import math
import time
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from PIL import Image

from accel_clip.command_line import hints_with_ranges, known_keys, load_config, parse_config, save_config
from accel_clip.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, SourceConfig
from accel_clip.data.pictures.decode import decode_picture
from accel_clip.faults import ConfigError
from accel_clip.typed import Range, WrongValue, fit, range_of, shown_value

WRONG: list[Any] = [math.inf, -math.inf, math.nan, 10**400, -(10**5000), -1, 0, 2**63, 1e308, True, "1"]
RANGES = {key: found for key, hint in hints_with_ranges().items() if (found := range_of(hint)) is not None}
DICTIONARIES = ("optim.lr_by_name", "data.caption_key")


def holds(key: str, value: Any) -> bool:
    """Return whether a value is one of a setting's, by what its plain annotation and its range say."""
    whole = "int" in str(known_keys()[key]) and key not in DICTIONARIES
    of_kind = isinstance(value, int) and not isinstance(value, bool)
    of_kind = of_kind or (isinstance(value, float) and not whole)
    low, high, is_open = RANGES[key].lowest, RANGES[key].highest, RANGES[key].is_open
    inside = of_kind and low <= value <= high and not (is_open and value == low)
    return (inside and abs(value) < 2**63) or (inside and isinstance(value, float))


def config_with(key: str, value: Any) -> Config:
    section, _, name = key.rpartition(".")
    value = {"x": value} if key in DICTIONARIES else value
    config = Config()
    if not section:
        return replace(config, **{name: value})
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


@pytest.mark.parametrize("key", RANGES)
def test_every_number_is_in_its_range_or_told_with_it(key: str) -> None:
    for value in WRONG:
        try:
            config = config_with(key, value)
        except ConfigError as error:
            said = str(error)
            assert not holds(key, value) or "patience" in key, said
            assert said.startswith(key) and "\n" not in said and len(said) < 300, said
            assert RANGES[key].words in said, said
        else:
            assert holds(key, value), (key, shown_value(value), config)


def test_every_numeric_setting_has_a_range() -> None:
    numeric = {key for key, hint in known_keys().items() if "int" in str(hint) or "float" in str(hint)}
    assert numeric - set(RANGES) == {"data.train", "data.val", "eval.zero_shot"} & numeric
    hints = get_type_hints(SourceConfig, include_extras=True)
    plain = get_type_hints(SourceConfig)
    for entry in fields(SourceConfig):
        assert "float" not in str(plain[entry.name]) or range_of(hints[entry.name]) is not None
    assert all(not is_dataclass(hint) for hint in known_keys().values())


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1" + "0" * 400, "9" * 5000, "1e400", "true"])
@pytest.mark.parametrize("form", ["flag", "file"])
def test_as_a_user_writes_them(form: str, text: str, tmp_path: Path) -> None:
    for key in ("train.steps", "optim.weight_decay", "data.workers"):
        section, _, name = key.partition(".")
        (tmp_path / "my.yaml").write_text(f"{section}: {{{name}: {text}}}")
        words = [f"--{key}", text] if form == "flag" else ["--config", str(tmp_path / "my.yaml")]
        start = time.process_time()
        with pytest.raises(ConfigError) as caught:
            parse_config(words, "train.py", "")
        said = str(caught.value)
        assert time.process_time() - start < 3 and "\n" not in said and len(said) < 700
        digits_in_a_file = form == "file" and len(text) == 5000  # which YAML itself does not read
        assert digits_in_a_file or key in said, said


@pytest.mark.slow
@pytest.mark.parametrize("key", RANGES)
def test_every_number_as_a_flag(key: str) -> None:
    for text in (".inf", "-.inf", ".nan", "1" + "0" * 400, "-1", "0", str(2**63), "1e308", "true", "9" * 5000):
        start = time.process_time()
        try:
            config = parse_config([f"--{key}", f"{{x: {text}}}" if key in DICTIONARIES else text], "train.py", "")
        except ConfigError as error:
            assert key in str(error) and "\n" not in str(error) and len(str(error)) < 700
        else:
            section, _, name = key.rpartition(".")
            value = getattr(getattr(config, section) if section else config, name)
            assert holds(key, next(iter(value.values())) if isinstance(value, dict) else value)
        assert time.process_time() - start < 2


@pytest.mark.parametrize("value", [math.inf, math.nan, 10**400, 1e308, [1.0, [math.nan]], {"a": {"b": -math.inf}}])
@pytest.mark.parametrize("section", [ModelConfig, LossConfig, OptimConfig])
def test_numbers_in_options_are_finite(section: type, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^(model|loss|optim)\.options\.x"):
        section(options={"x": value})
    with pytest.raises(ConfigError, match=r"^optim\.schedule_options\.x"):
        OptimConfig(schedule_options={"x": value})


@pytest.mark.parametrize("weight", [0, -1, math.inf, math.nan, 1e308, 10**400])
def test_weights_of_sources_are_told_with_their_source(weight: Any) -> None:
    with pytest.raises(ConfigError, match=r"^data\.train: weight of a\.csv: .* above 0"):
        DataConfig(train=[SourceConfig("a.csv", weight=weight)])
    with pytest.raises(ConfigError, match=r"^data\.caption_key\.title: .* above 0"):
        DataConfig(val=[SourceConfig("a.csv", caption_key={"title": weight})])


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("loss", "coca", {"caption_loss_weight": -1}),
        ("loss", "coca", {"clip_loss_weight": True}),
        ("loss", "coca", {"clip_loss_weight": 1e30}),
        ("loss", "distill", {"image_columns": "a", "text_columns": "b", "weight": 1e30}),
        ("loss", "distill", {"image_columns": "a", "text_columns": "b", "teacher_scales": [0]}),
        ("optim", "sgd", {"momentum": 1e30}),
        ("optim", "sgd", {"momentum": True}),
        ("optim", "adamw", {"eps": "small"}),
        ("optim", "adamw", {"betas": [0.9, 2**62]}),
        ("optim", "nadamw", {"eps": False}),
    ],
)
def test_options_that_are_numbers_have_ranges(kind: str, name: str, options: dict[str, Any]) -> None:
    from torch import nn, ones

    from accel_clip.losses.base import build_loss
    from accel_clip.optim.optimizers import build_optimizer

    with pytest.raises(ConfigError, match=rf"^{kind}\.options"):
        if kind == "loss":
            build_loss(LossConfig(name, options=options))
        else:
            build_optimizer([("w", nn.Parameter(ones(2, 2)))], OptimConfig(name, options=options))


def test_restarts_that_never_end_are_refused() -> None:
    from accel_clip.optim.schedules import build_schedule

    for multiplier in (1 + 1e-12, 0.5, 1e6, True):
        options = {"period": 1, "multiplier": multiplier}
        start = time.process_time()
        with pytest.raises(ConfigError, match=r"schedule_options"):
            build_schedule(OptimConfig(schedule="cosine_restarts", schedule_options=options), 10**12).multiplier(10**11)
        assert time.process_time() - start < 1


def test_no_limit_on_pictures_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(["--data.max_pixels", ".inf"], "train.py", "")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").data.max_pixels == math.inf
    Image.new("1", (100, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # at twice that Pillow itself raises
    for limit in (math.inf, 1e308):
        assert decode_picture(tmp_path / "large.png", limit).size == (100, 100)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_values_are_shown_shortly_whatever_they_are() -> None:
    endless: list[Any] = []
    endless.append(endless)
    for value in (10**10_000, "x" * 10**6, endless, {"a": endless}, list(range(10**6)), b"\0" * 10**6):
        assert len(shown_value(value)) < 400


def test_what_fits_stays_as_it_is() -> None:
    assert fit(3, float, "x") == 3 and isinstance(fit(3, float, "x"), int)
    assert fit([1, 2.5], tuple[int, float], "x") == (1, 2.5)
    for value, hint in ((True, int), (1, bool), (1.0, int), ([1], tuple[int, int]), ({1: 1}, dict[str, int])):
        with pytest.raises(WrongValue, match=r"^x"):
            fit(value, hint, "x")
    assert not Range(0, 1).holds(math.nan) and Range(0, 10).holds(0) and not Range(0, 10, is_open=True).holds(0)
    assert json.loads(json.dumps(fit({"a": [1]}, Any, ""))) == {"a": [1]}
