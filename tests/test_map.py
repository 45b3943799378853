"""The map of the code: no file is missing from it, and no document names what there is not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import accel_clip

PACKAGE = Path(accel_clip.__file__).parent
ROOT = Path(__file__).parent.parent
MAP = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py")
IN_DIAGRAM = re.compile(r"[\w/]+\.py")
IN_TEXT = re.compile(r"`((?:accel_clip|tests|benchmarks|docs)/[\w/.]+)`")
ANSWERS = re.compile(r"`(accel_clip/[\w/]+\.py)`(?:: ((?:`[\w.]+`(?:, )?)+))?")


def first_line(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]


def names_in(file: Path) -> set[str]:
    """Return the names that a module defines or assigns at its top, and those of its classes' methods."""
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {each.id for target in node.targets for each in ast.walk(target) if isinstance(each, ast.Name)}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_file_stands_in_the_map_by_its_own_words(file: Path) -> None:
    name = file.relative_to(PACKAGE).as_posix()
    line = f"- [`{name}`](../accel_clip/{name}): {first_line(file)}"
    assert line in MAP.splitlines(), f"docs/map.md lacks this line: {line}"


def test_the_map_names_no_file_that_is_not_there() -> None:
    named = re.findall(r"^- \[`([\w/.]+)`\]", MAP, re.MULTILINE)
    assert sorted(named) == sorted(file.relative_to(PACKAGE).as_posix() for file in FILES)


def test_the_way_of_a_picture_goes_through_files_that_are_there() -> None:
    [diagram] = re.findall(r"```mermaid\n(.*?)```", MAP, re.DOTALL)
    files = IN_DIAGRAM.findall(diagram)
    assert len(files) > 20 and not [file for file in files if not (PACKAGE / file).is_file()]


def test_answers_name_what_their_files_define() -> None:
    table = MAP[MAP.index("## Questions") : MAP.index("## The way")]
    answers = [(file, re.findall(r"[\w.]+", names)) for file, names in ANSWERS.findall(table)]
    assert len(answers) > 20
    for file, names in answers:
        assert set(names) <= names_in(ROOT / file), f"docs/map.md names {names} in {file}"


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "README.md", "README.zh-CN.md", "docs/map.md"])
def test_documents_name_files_that_are_there(document: str) -> None:
    paths = IN_TEXT.findall((ROOT / document).read_text(encoding="utf-8"))
    assert not [path for path in paths if not (ROOT / path).exists()]
