"""The package itself: no module runs what it reads, and no document suggests what is dangerous."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

from accel_clip.config import ModelConfig, SourceConfig
from accel_clip.faults import ConfigError
from accel_clip.models.build import build_model
from helpers.commands import ROOT
from helpers.models import small_model
from helpers.stand_ins import Payload

PACKAGE = ROOT / "accel_clip"


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
