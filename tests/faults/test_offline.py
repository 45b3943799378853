"""Without a network: the demo runs, and names on the hub fail soon."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import ROOT, run
from helpers.models import small_model


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
