"""Credentials: known by their names and forms, refused in settings, and masked in all that is said or written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accel_clip import cli
from accel_clip.data.bad_samples import BadSample, BadSampleLog
from accel_clip.faults import ConfigError
from accel_clip.redaction import masked, printable, refuse_credentials
from accel_clip.run.folder import RunFolder
from helpers.commands import train_py
from helpers.models import small_model
from helpers.patience import within
from helpers.pictures import write_plain

TOKEN = "hf_CANARYcanaryCANARYcanaryCANARYcanary"
Train = Callable[..., tuple[int, str]]


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
    log.take_in((bad, bad), 2)
    log.collect(Alone())
    written = log.file.read_text() + json.dumps(log.state_dict())
    assert "CANARY" not in written and log.counts == {"missing_file": 1}
    assert json.loads(log.file.read_text())["path"] == 'a"b"?token=***'
    other = BadSampleLog(tmp_path / "bad_samples.jsonl", 1.0)
    other.load_state_dict(log.state_dict())
    other.take_in((bad,), 1)
    other.collect(Alone())
    assert other.counts == {"missing_file": 1}


def test_a_traceback_shows_no_credential(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise LookupError(f"no answer from {SIGNED}")

    assert cli.exit_code_after(broken) == 1
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
        write_plain(tmp_path / f"{number}.png")
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
