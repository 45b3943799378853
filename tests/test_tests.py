"""The house of the tests: what several share lies in helpers, and every room of the package has its place here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import accel_clip

TESTS = Path(__file__).parent
PACKAGE = Path(accel_clip.__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
OWNS_ENTRIES = TESTS / "helpers" / "registries.py"
TESTED_ELSEWHERE = {
    "config": "test_command_line.py and faults/test_hostile_numbers.py",
    "plugins": "data/test_started_anew.py",
    "randomness": "checkpoint/test_checkpoint.py",
    "typed": "faults/test_hostile_numbers.py",
    "typed_json": "faults/test_hostile_files.py",
}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{each.name}" for each in node.names))
        elif isinstance(node, ast.Import):
            yield from (each.name for each in node.names)


def modules_of_tests(tree: ast.AST) -> list[str]:
    return [name for name in imported(tree) if any(word.startswith("test_") for word in name.split("."))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(TESTS)))
def test_no_module_takes_from_a_test_module_or_out_of_a_registry(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert not modules_of_tests(tree), "what two test modules use lies in tests/helpers"
    inner = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "_entries"]
    assert file == OWNS_ENTRIES or not inner, "the fixture own_entries ends what a test registers"


def test_an_import_of_a_test_module_is_seen_wherever_it_stands() -> None:
    code = "import test_a\nfrom faults import test_b\ndef f():\n    from tests.test_c import g\nfrom helpers import web"
    assert len(modules_of_tests(ast.parse(code))) == 4


def test_names_of_files_are_their_own() -> None:
    """Test modules are imported by their bare names."""
    names = [file.name for file in FILES if file.name.startswith("test_")]
    assert len(names) == len(set(names))


def test_every_room_has_a_place_of_its_tests() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and list(path.rglob("test_*.py"))}
    modules = {path.stem.removeprefix("test_") for path in FILES}
    without = rooms - folders - modules - {"__init__"}
    assert without == set(TESTED_ELSEWHERE), "name where they are tested, or that they are no longer untested"
    assert all((TESTS / word).exists() for words in TESTED_ELSEWHERE.values() for word in words.split(" and "))
