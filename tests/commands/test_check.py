"""`accel-clip check`: exact counts of planted faults, every mistake in one run, the slower side, nothing written."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy
import open_clip
import pytest
import torch
from datasets import Dataset
from datasets import Image as Picture
from PIL import Image

from accel_clip import cli
from accel_clip.config import Config, DataConfig, ModelConfig, TrainConfig
from accel_clip.data.examples import preparation_for
from accel_clip.data.feed import build_feed
from accel_clip.data.feed_parts import LoaderRank
from accel_clip.data.pairs import open_training
from accel_clip.models.build import build_model
from helpers.commands import accel_clip, run
from helpers.comparison import rounding
from helpers.models import small_model
from helpers.shards import write_tar
from helpers.web import served

KEYS = {
    "run": "output_dir goes_on device num_processes precision num_pairs num_held_out num_held_out_trained batch_size "
    "accumulate steps_per_epoch num_epochs num_steps num_warmup_steps steps_between_evaluations starting_loss",
    "model": "name num_parameters num_trained image_size context_length micro_batch_size num_micro_batches "
    "graphs_kept weights_bytes optimizer_bytes graph_bytes free_bytes",
    "data": "num_pairs num_looked_at num_unusable examples num_missing_files captions unusable_share unusable_limit "
    "num_repeated_pictures num_repeated_captions num_cut_captions num_file_names token_limit picture_size "
    "decoding_seconds pairs_in_batch",
    "speed": "num_workers loader step step_pairs bottleneck expected training_seconds",
    "disk": "checkpoint_bytes num_checkpoints export_bytes features_bytes pictures_bytes needed_bytes available_bytes",
}
PLUGIN = """
import time
from accel_clip import LOSSES, SOURCES
from accel_clip.data.sources.demo import open_demo

class Slow:
    name = "slow"
    def __init__(self, demo): self.demo = demo
    def __len__(self): return 200
    def __getitem__(self, index):
        time.sleep(0.02)
        return self.demo[index]
    def key(self, index): return self.demo.key(index)

@SOURCES.register("slow_to_fetch")
def slow(argument, options): return Slow(open_demo("", options))

@LOSSES.register("slow_to_compute")
def slow_loss(image_features, text_features, logit_scale, output_dict=True):
    time.sleep(0.2)
    return {"slow_loss": -(image_features * text_features).sum(dim=-1).mean() * logit_scale}
"""


class Checker:
    """Runs the command in a folder, in this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.model = small_model(folder)
        monkeypatch.chdir(folder)

    def __call__(self, *words: str) -> tuple[int, str]:
        """Return the exit code and what stands on standard output."""
        common = ["check", "--model.name", self.model, "--output_dir", "run", "--seconds", "0", *words]
        self.monkeypatch.setattr(sys, "argv", ["accel-clip", *common])
        self.capsys.readouterr()
        try:
            code = cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, self.capsys.readouterr().out

    def report(self, *words: str) -> dict[str, Any]:
        """Return the JSON report, whose exit code is that of the command."""
        code, out = self("--json", *words)
        report = json.loads(out)
        assert report["exit_code"] == code
        return report


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Checker:
    return Checker(tmp_path, monkeypatch, capsys)


def planted_table(folder: Path) -> str:
    """Write 60 pairs: 3 missing, 2 corrupt, 1 empty caption, 2 repeated, 1 caption too long, the rest sound."""
    (folder / "图").mkdir()
    rows = [(f"图/{number}.png", f"picture number {number}, 第{number}张") for number in range(58)]
    for number, (path, _) in enumerate(rows):
        Image.new("RGB", (40 + number, 50), (number, 100, 0)).save(folder / path)
    for number in (7, 20, 41):
        (folder / rows[number][0]).unlink()
    (folder / rows[11][0]).write_bytes((folder / rows[11][0]).read_bytes()[:60])
    (folder / rows[12][0]).write_text("<!doctype html><title>404</title>")
    rows[30] = (rows[30][0], "  ")
    rows[31] = (rows[31][0], "word " * 60)
    rows += [rows[3], rows[50]]
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return "pairs.csv"


def test_planted_faults_are_counted_exactly_and_nothing_is_written(tmp_path: Path, check: Checker) -> None:
    table = planted_table(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    words = ("--data.train", table, "--data.val_fraction", "0", "--train.batch_size", "8", "--train.epochs", "30")
    report = check.report(*words, "--data.max_bad_fraction", "0.1")
    data = report["data"]
    assert (data["num_pairs"], data["num_looked_at"]) == (60, 60)
    found = {reason: number for reason, number in data["num_unusable"].items() if number}
    assert found == {"missing_file": 3, "unreadable": 2, "no_caption": 1}
    assert (data["num_repeated_pictures"], data["num_repeated_captions"], data["num_cut_captions"]) == (2, 2, 1)
    assert data["token_limit"] == 32 and data["unusable_share"] == pytest.approx(0.1)
    assert {name: set(report[name]) for name in KEYS if name != "speed"} == {
        name: set(keys.split()) for name, keys in KEYS.items() if name != "speed"
    }
    assert report["speed"] is None and report["exit_code"] == 0
    assert (report["run"]["num_steps"], report["run"]["steps_per_epoch"], report["run"]["num_warmup_steps"]) == (
        (210, 7, 21)
    )
    assert report["run"]["starting_loss"] == pytest.approx(math.log(8))

    code, out = check(*words)
    assert code == 3 and "6 of 60 pairs are unusable (10.0%)" in out and "图/7.png" in out
    assert out.strip().splitlines()[-1] == "verdict: not ready: 1 problem; exit code 3"
    assert sorted(tmp_path.rglob("*")) == before


class Tree:
    """Everything in a folder: names, kinds, bytes, and when files and folders were changed."""

    def __init__(self, folder: Path) -> None:
        paths = [folder, *sorted(folder.rglob("*"))]
        self.entries = {
            str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path in paths
        }

    def changed(self, before: Tree) -> list[str]:
        """Return the names of what is new, gone or different."""
        names = {*self.entries, *before.entries}
        return sorted(name for name in names if self.entries.get(name) != before.entries.get(name))


HELPED_PLUGIN = """
import helper
from accel_clip import SOURCES
from accel_clip.data.sources.demo import open_demo

if "mine" not in SOURCES:  # of the test before
    SOURCES.register("mine", description="mine")(open_demo)
"""


KINDS = ("frog", "owl")


def every_source(folder: Path) -> None:
    """Write pairs in every form."""
    for number in range(12):
        file = folder / "folder" / KINDS[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (number, 0, 0)).save(file)
    files = sorted((folder / "folder").rglob("*.png"))
    rows = [{"image": str(file), "caption": f"picture {file.stem}"} for file in files]
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as table:
        csv.writer(table).writerows([("image", "caption"), *(row.values() for row in rows)])
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pictures = [{"bytes": file.read_bytes(), "path": None} for file in files]
    columns = {"image": pictures, "caption": [row["caption"] for row in rows]}
    dataset = Dataset.from_dict(columns).cast_column("image", Picture())
    dataset.save_to_disk(folder / "saved")
    (folder / "rows").mkdir()
    dataset.to_parquet(folder / "rows" / "0.parquet")
    members = {}
    for number, file in enumerate(files):
        members |= {
            f"{number}.png": file.read_bytes(),
            f"{number}.txt": b"x",
            f"{number}.cls": KINDS[number % 2].encode(),
        }
    write_tar(folder / "shards" / "0.tar", members)
    (folder / "my_plugin.py").write_text(HELPED_PLUGIN)
    (folder / "helper.py").write_text("x = 1\n")


FORMS = "pairs.csv pairs.jsonl rows/0.parquet folder saved shards shards/0.tar hf:rows hf-stream:rows demo mine http"


@pytest.mark.parametrize(
    ("forms", "seconds"), [(["shards"], "0"), pytest.param(FORMS.split(), "0.1", marks=pytest.mark.slow)]
)
def test_nothing_is_written_whatever_the_data_are(
    forms: list[str],
    seconds: str,
    tmp_path: Path,
    check: Checker,
    monkeypatch: pytest.MonkeyPatch,
    own_plugins: None,
) -> None:
    every_source(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    before = Tree(tmp_path)
    words = ["--plugins", "my_plugin.py", "--train.batch_size", "4", "--train.steps", "2", "--samples", "4"]
    words += ["--data.val", "shards/0.tar", "--eval.zero_shot", "shards/0.tar", "--seconds", seconds]
    with served(tmp_path) as address:
        for form in forms:
            report = check.report("--data.train", f"{address}/shards/0.tar" if form == "http" else form, *words)
            assert report["data"] is not None and not report["problems"], (form, report["problems"])
            assert Tree(tmp_path).changed(before) == [], form
    assert not sys.dont_write_bytecode


def test_captions_of_every_source_are_shown_as_training_sees_them(tmp_path: Path, check: Checker) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for number in range(8):
            Image.new("RGB", (40, 40), (number, 100, len(name))).save(tmp_path / name / f"{number}.png")
    texts = {"one": "['a frog', 'a green frog']", "two": "word " * 60}
    for name, text in texts.items():
        rows = [("image", "caption"), *((f"{number}.png", text) for number in range(8))]
        with (tmp_path / name / "pairs.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    words = ("--data.train", "[one/pairs.csv, two/pairs.csv]", "--data.val_fraction", "0", "--train.batch_size", "8")
    shown = check.report(*words)["data"]["captions"]
    assert set(shown) == {"one/pairs.csv", "two/pairs.csv"}
    assert set(shown["one/pairs.csv"]) == {"a frog", "a green frog"} and len(shown["one/pairs.csv"]) == 3
    assert all(re.fullmatch(r"(word ){18,20}… \[cut after 32 tokens\]", text) for text in shown["two/pairs.csv"])
    code, out = check(*words)
    assert code == 0 and re.search(r"captions of one/pairs\.csv a (green )?frog\n {25}a (green )?frog\n", out)


def test_every_mistake_is_told_in_one_run(tmp_path: Path, check: Checker) -> None:
    (tmp_path / "broken.csv").write_text("a,b\n1,2\n")
    (tmp_path / "my.yaml").write_text(
        "optim: {lrr: 1, lr: fast, schedule: cosin, lr_by_name: {'visul.*': 1e-5, 'txt.*': 1e-4}}\n"
        "train: {epochs: -1, precision: int8}\nmoddel: {name: x}\n"
    )
    code, out = check(
        *("--config", "my.yaml", "--loss.name", "clipp", "--optim.name", "adamv", "--model.freeze", "[vizual.*, tex]"),
        *("--data.train", "[nowhere.csv, broken.csv, demo]", "--data.val", "nothere.tsv", "--track.to", "tensorbord"),
        *("--train.batch_size", "255", "--processes", "2", "--data.wrkers", "3", "--stop.patience", "3", "stray"),
    )
    problems = [line.strip() for line in out.split("problems\n")[1].split("\n\n")[0].splitlines()]
    expected = [
        *(
            "optim.lrr",
            "optim.lr: expected float, null, got fast",
            "cosin'",
            "'visul.*'",
            "'txt.*'",
            "train.epochs: -1",
        ),
        *("int8", "moddel", "clipp", "adamv", "vizual.*", "'tex'", "nowhere.csv", "data.image_key: broken.csv"),
        *("nothere.tsv", "tensorbord", "train.batch_size: 255", "data.wrkers", "stop.patience: 3", "stray"),
    ]
    for part in expected:
        assert len([line for line in problems if part in line]) == 1, (part, problems)
    assert len(problems) == len(expected) and code == 2
    assert out.strip().splitlines()[-1] == f"verdict: not ready: {len(expected)} problems; exit code 2"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "code", "number", "parts"),
    [
        (["--data.train", "[nowhere.csv, nothere.csv]"], 3, 2, ["nowhere.csv", "nothere.csv"]),
        (
            ["--optim.warmup", "9000", "--train.batch_size", "33", "--processes", "2"],
            2,
            2,
            ["optim.warmup", "34 or 32"],
        ),
        (["--train.batch_size", "20000"], 2, 1, ["train.batch_size: 20000", "11648"]),
        (["--stop.metric", "val/los", "--data.val_fraction", "0.1"], 2, 1, ["stop.metric", "val/loss"]),
        (["--checkpoint.keep", "1000000000"], 2, 1, ["output_dir", "checkpoint.keep"]),
        (["--plugins", "mine.py", "--loss.name", "mine"], 2, 1, ["plugins: mine.py"]),
        (["--model.freeze", "*"], 2, 1, ["model.freeze", "nothing to train"]),
        (["--output_dir", "small.json/run"], 2, 1, ["output_dir", "not a folder"]),
        (["--data.train", "gone.csv", "--train.batch_size", "4", "--data.max_bad_fraction", "1"], 3, 1, ["image_root"]),
    ],
)
def test_what_cannot_run_has_the_exit_code_of_its_kind(
    tmp_path: Path, check: Checker, words: list[str], code: int, number: int, parts: list[str]
) -> None:
    (tmp_path / "gone.csv").write_text("image,caption\n" + "".join(f"{i}.png,picture {i}\n" for i in range(20)))
    report = check.report("--samples", "20", "--data.val_fraction", "0", *words)
    assert report["exit_code"] == code
    told = " ".join(problem["message"] for problem in report["problems"])
    assert all(part in told for part in parts), told
    assert len(report["problems"]) == number


def test_bad_starting_points_are_warned_of(tmp_path: Path, check: Checker) -> None:
    table = planted_table(tmp_path)
    open_clip.add_model_config(Path(check.model))
    torch.save(open_clip.create_model("small").state_dict(), tmp_path / "weights.pt")
    report = check.report(
        *("--data.train", table, "--data.max_bad_fraction", "0.3", "--train.batch_size", "40", "--train.steps", "12"),
        *("--optim.warmup", "8", "--eval.every", "2", "--model.freeze", "[image, text]", "--optim.lr", "0.01"),
        *("--model.pretrained", "weights.pt", "--data.val_fraction", "0.1"),
    )
    told = [warning.partition(":")[0] for warning in report["warnings"]]
    assert told[:6] == ["train.steps", "optim.warmup", "train.batch_size", "eval.every", "model.freeze", "optim.lr"]
    assert report["verdict"].startswith("ready, with") and report["exit_code"] == 0
    clip = open_clip.create_model("small")
    assert sum(report["model"]["num_parameters"].values()) == sum(each.numel() for each in clip.parameters())
    assert report["model"]["num_trained"] == {"image": 0, "text": 0, "other": 1}
    assert not [each for each in check.report("--train.batch_size", "32")["warnings"] if "eval" in each or "lr" in each]


def test_held_out_pairs_that_are_few_or_trained_on_are_told(tmp_path: Path, check: Checker) -> None:
    table = planted_table(tmp_path)
    words = ("--data.train", table, "--data.max_bad_fraction", "0.9", "--train.batch_size", "2", "--seconds", "0")
    report = check.report(*words, "--data.val", table)
    assert report["run"]["num_held_out_trained"] == report["run"]["num_held_out"] == 60
    assert any("60 of its 60 pairs show pictures that are trained on" in each for each in report["warnings"])
    assert not any("say little" in each for each in report["warnings"])
    report = check.report(*words, "--data.val_fraction", "0.1")
    assert report["run"]["num_held_out_trained"] == 0
    assert any("below 32 loss and recall say little" in each for each in report["warnings"])


def write_noise(folder: Path, captions: list[str]) -> str:
    """Write a table of pictures of noise, no two alike, with these captions."""
    with (folder / "noise.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [("image", "caption"), *((f"n{row}.png", text) for row, text in enumerate(captions))]
        )
    for row in range(len(captions)):
        noise = numpy.random.default_rng(row).integers(0, 256, (90, 120, 3), numpy.uint8)
        Image.fromarray(noise).save(folder / f"n{row}.png")
    return "noise.csv"


def pixels_in(page: str) -> list[numpy.ndarray]:
    """Return the pictures that a page holds, uint8 [H, W, 3] each."""
    return [
        numpy.asarray(Image.open(io.BytesIO(base64.b64decode(each))))
        for each in re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    ]


def batch_of_training(config: Config) -> dict[int, numpy.ndarray]:
    """Return the pictures of the first batch that training gets with these settings, by the number of their pair."""
    preparation = preparation_for(build_model(config.model), config)
    feed = build_feed(open_training(config.data), config, num_processes=1)
    with closing(feed.open(range(1), LoaderRank(0, 1, 0, pin_memory=False), preparation)) as batches:
        batch = next(batches)
    return {
        int(sample): image.permute(1, 2, 0).numpy() for sample, image in zip(batch.sample, batch.image, strict=True)
    }


def test_the_page_shows_the_pixels_and_the_captions_that_training_gets(tmp_path: Path, check: Checker) -> None:
    captions = ["一只青蛙", "<script>alert(1)</script> & co", f"start {'word ' * 40}end", " ", *map(str, range(26))]
    table = write_noise(tmp_path, captions)
    before = set(tmp_path.rglob("*"))
    words = ("--data.train", table, "--data.val_fraction", "0", "--train.batch_size", "15")
    code, _ = check(*words, "--data.max_bad_fraction", "1", "--show", "look/here")
    page = (tmp_path / "look" / "here" / "index.html").read_text(encoding="utf-8")
    assert code == 0
    assert {path.relative_to(tmp_path).as_posix() for path in set(tmp_path.rglob("*")) - before} == {
        *("look", "look/here", "look/here/index.html", "look/here/.accel_clip.json")
    }
    data = DataConfig(train=[table], val_fraction=0.0, workers=0)
    config = Config(model=ModelConfig(name=check.model), data=data, train=TrainConfig(batch_size=15))
    trained = batch_of_training(config)
    shown = pixels_in(page)
    assert len(shown) == 23 and "4. not used" in page and "no_caption" in page
    both = [(sample, image) for sample, image in zip([0, 1, 2, *range(4, 24)], shown, strict=True) if sample in trained]
    assert len(both) > 5 and all((image == trained[sample]).all() for sample, image in both)
    assert '<p dir="auto">一只青蛙</p>' in page and "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co</p>" in page
    read, unread = re.search(r'<p dir="auto">(start [^<]*)<del>([^<]*)</del>', page).groups()
    assert read + unread == captions[2].strip() and 20 < len(read.split()) <= 30 and page.count("<del>") == 1


def test_captions_that_are_names_of_files_are_told(tmp_path: Path, check: Checker) -> None:
    words = ("--train.batch_size", "4", "--data.val_fraction", "0")
    table = write_noise(tmp_path, ["IMG_0001.JPG", "photos/b c.webp", "a frog. 2.jpg", "a.b", "Version 1.2", "a jpg"])
    report = check.report("--data.train", table, *words)
    assert report["data"]["num_file_names"] == 3
    assert any("3 of 6 captions are names of picture files" in each for each in report["warnings"])
    assert check.report("--data.train", "demo", *words)["data"]["num_file_names"] == 0


def test_the_page_takes_the_place_of_an_earlier_one_and_of_nothing_else(tmp_path: Path, check: Checker) -> None:
    table = write_noise(tmp_path, ["a frog"] * 6)
    words = ("--data.train", table, "--train.batch_size", "2", "--data.val_fraction", "0", "--show", "look")
    assert check(*words)[0] == 0
    (tmp_path / "n0.png").unlink()
    assert check(*words)[0] != 2 and "1. not used" in (tmp_path / "look" / "index.html").read_text(encoding="utf-8")
    (tmp_path / "look" / "notes.txt").write_text("mine")
    before = (tmp_path / "look" / "index.html").read_bytes()
    code, out = check(*words)
    assert code == 2 and "--show: look is where the contact sheet would go" in out and "notes.txt" in out
    assert (tmp_path / "look" / "index.html").read_bytes() == before
    assert check(*words[:-1], table)[0] == 2 and (tmp_path / table).read_text(encoding="utf-8").startswith("image")


def test_the_page_shows_each_source_and_the_beginnings_of_streams(tmp_path: Path, check: Checker) -> None:
    table = write_noise(tmp_path, [f"of a table {number}" for number in range(30)])
    member = (tmp_path / "n0.png").read_bytes()
    write_tar(tmp_path / "served" / "x.tar", {f"{n}.{end}": member if end == "png" else b"of a stream %d" % n
                                              for n in range(30) for end in ("png", "txt")})  # fmt: skip
    with served(tmp_path / "served") as address:
        words = ("--data.train", f"[{table}, demo, '{address}/x.tar']", "--train.batch_size", "6", "--train.steps", "2")
        assert check(*words, "--show", "look")[0] == 0
    page = (tmp_path / "look" / "index.html").read_text(encoding="utf-8")
    assert page.count("<h2>") == 3 and len(pixels_in(page)) == 3 * 24
    assert page.count("of a table") == 24 and page.count("of a stream") == 24


def test_decoded_pictures_that_are_kept_count_on_the_disk_where_they_fit(tmp_path: Path, check: Checker) -> None:
    for number in range(20):
        Image.new("RGB", (64, 48), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(f"{i}.png,picture {i}\n" for i in range(20)))
    words = ("--data.train", "pairs.csv", "--data.val_fraction", "0", "--train.batch_size", "4")
    without, with_room, without_room = (
        check.report(*words, "--data.image_cache_gib", gib) for gib in ("0", "1", "0.0001")
    )
    whole = 20 * 64 * 48 * 3
    assert (without["disk"]["pictures_bytes"], with_room["disk"]["pictures_bytes"]) == (0, whole)
    assert with_room["disk"]["needed_bytes"] - without["disk"]["needed_bytes"] == whole
    assert without_room["disk"]["needed_bytes"] == without["disk"]["needed_bytes"]
    told = [line for line in without_room["warnings"] if line.startswith("data.image_cache_gib")]
    assert len(told) == 1 and "more than 0.0001" in told[0]
    assert not [line for line in with_room["warnings"] if "image_cache" in line]


def test_the_starting_loss_of_siglip_is_that_of_unrelated_features(check: Checker) -> None:
    run_facts = check.report("--loss.name", "siglip", "--train.batch_size", "16", "--samples", "5")["run"]
    signs = 2 * torch.eye(16, dtype=torch.float64) - 1
    dense = -torch.nn.functional.logsigmoid(signs * -10.0).sum() / 16
    assert run_facts["starting_loss"] == pytest.approx(dense.item(), rel=rounding(16 * 16))


def test_a_step_that_is_too_long_to_try_is_computed_from_smaller_ones() -> None:
    from accel_clip.commands.check.speed import extrapolated

    fixed, per_pair = 0.8, 0.1  # seconds
    times = {pairs: fixed + per_pair * pairs for pairs in (2, 8, 32)}
    assert extrapolated(times, 256) == pytest.approx(fixed + per_pair * 256)
    assert extrapolated({**times, 2: 9.0}, 256) == pytest.approx(fixed + per_pair * 256)  # the first one may be slow
    assert extrapolated(times, 32) == times[32]


@pytest.mark.slow
@pytest.mark.usefixtures("own_plugins")
def test_the_slower_of_loader_and_step_is_named(tmp_path: Path, check: Checker) -> None:
    (tmp_path / "slow_parts.py").write_text(PLUGIN)
    words = ("--plugins", "slow_parts.py", "--data.workers", "1", "--train.threads", "1", "--seconds", "3")
    slow = ("--data.train", "slow_to_fetch", "--data.val_fraction", "0", "--train.batch_size", "64")
    loader = check.report(*words, *slow, "--samples", "5")
    speed = loader["speed"]
    assert set(speed) == set(KEYS["speed"].split())
    assert speed["bottleneck"] == "loader" and speed["loader"]["1"] <= 51, speed  # 20 ms a pair
    assert speed["loader"]["2"] > 1.3 * speed["loader"]["1"]
    assert any("data.workers 2" in warning for warning in loader["warnings"])
    assert speed["expected"] == pytest.approx(speed["loader"]["1"])

    step = check.report(*words, "--loss.name", "slow_to_compute", "--train.batch_size", "8", "--samples", "9")["speed"]
    assert step["bottleneck"] == "step" and step["step_pairs"] == 8
    assert step["step"] <= 40  # 8 pairs in 0.2 s and a little


@pytest.mark.slow
def test_the_command_itself_on_the_demo_and_on_a_terminal_without_chinese(tmp_path: Path) -> None:
    done = accel_clip("check", "--samples", "50", "--seconds", "2", folder=tmp_path)
    assert done.code == 0, done.err
    titles = [line for line in done.out.splitlines() if line and not line.startswith(" ")]
    assert titles[:5] == ["run", "model", "data", "speed", "disk"] and titles[-1].startswith("verdict: ready")
    assert list(tmp_path.iterdir()) == []
    table = planted_table(tmp_path)
    words = ("--data.train", table, "--train.batch_size", "8", "--model.name", small_model(tmp_path), "--seconds", "0")
    code = "import sys; from accel_clip.cli import main; sys.exit(main())"
    plain = run(sys.executable, "-c", code, "check", *words, folder=tmp_path, PYTHONIOENCODING="ascii")
    assert plain.code == 3 and "\\u56fe/" in plain.out and "Traceback" not in plain.err, plain.err
