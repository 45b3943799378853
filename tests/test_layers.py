"""The floors of the house: imports point down, the package never imports itself, and help is quick."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

import accel_clip

PACKAGE = Path(accel_clip.__file__).parent
FLOORS = (
    ("faults", "meters", "randomness", "typed"),
    ("redaction", "registry", "typed_json"),
    ("console", "config"),
    ("files", "plugins"),
    ("command_line", "process"),
    ("checkpoint",),
    ("data", "models", "optim", "losses"),
    ("step", "evaluation"),
    ("run",),
    ("trainer",),
    ("commands",),
    ("cli",),
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    """Return the first-level module or package that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(file: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "accel_clip":
            parts = node.module.split(".")
            rooms.update({parts[1]} if len(parts) > 1 else {alias.name for alias in node.names})
        elif isinstance(node, ast.Import):
            rooms.update(a.name.split(".")[1] for a in node.names if a.name.startswith("accel_clip."))
    return rooms


def test_every_module_has_a_floor() -> None:
    assert {room_of(file) for file in modules()} - {"__init__"} == set(FLOOR_OF)


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    room = room_of(file)
    if room == "__init__":
        return
    for imported in imported_rooms(file):
        assert imported == room or FLOOR_OF[imported] <= FLOOR_OF[room], f"{room} imports {imported} from above"


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_modules_say_their_job_and_do_not_print(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "print" not in calls


def test_the_floors_stand_in_the_documents() -> None:
    document = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| ((?:`\w+`(?:, )?)+) \|$", document, re.MULTILINE)
    assert [set(re.findall(r"\w+", row)) for row in rows] == [set(names) for names in reversed(FLOORS)]


def module_of(file: Path) -> str:
    """Return the name by which a file of the package is imported."""
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imported_modules(file: Path, known: Collection[str]) -> set[str]:
    """Return the modules of the package that a file imports anywhere: at its top, in functions, for types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if name in known else node.module for name in names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return (found & set(known)) - {"accel_clip", module_of(file)}


def in_circles(edges: Mapping[str, set[str]]) -> set[str]:
    """Return the modules from which imports lead back to themselves: those left when ends are taken off both ways."""
    left = {name: set(to) for name, to in edges.items()}
    while True:
        imported = {each for to in left.values() for each in to}
        kept = {name: to & left.keys() for name, to in left.items() if to & left.keys() and name in imported}
        if len(kept) == len(left):
            return set(kept)
        left = kept


def test_no_files_import_each_other_in_a_circle() -> None:
    """Lazy imports, and those for types alone, count: a circle that is hidden by one is still a circle."""
    files = {module_of(file): file for file in modules() if file != PACKAGE / "__init__.py"}
    assert in_circles({name: imported_modules(file, files) for name, file in files.items()}) == set()


def test_a_circle_is_found() -> None:
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}) == {"a", "b", "c"}


def set_outside(tree: ast.AST) -> list[str]:
    """Return the attributes of its own that a class sets in a method and not in `__init__`, but for dataclasses."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and not is_dataclass(node):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            own = {each.name: attributes_set(each) for each in methods}
            at_start = own.pop("__init__", set())
            found += [f"{node.name}.{name}" for names in own.values() for name in sorted(names - at_start)]
    return found


def attributes_set(method: ast.FunctionDef) -> set[str]:
    """Return the names `x` of every `self.x` that a method writes."""
    written = [node for node in ast.walk(method) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return {node.attr for node in written if isinstance(node.value, ast.Name) and node.value.id == "self"}


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_an_object_is_whole_once_it_is_built(file: Path) -> None:
    if room_of(file) in ("trainer", "run", "step"):
        assert not set_outside(ast.parse(file.read_text(encoding="utf-8")))


def test_an_attribute_that_is_set_late_is_found() -> None:
    late = "  def f(self):\n    self.x = self.y = 2\n    with a as self.z: pass"
    code = f"class A:\n  def __init__(self):\n    self.x = 1\n{late}"
    assert set_outside(ast.parse(code)) == ["A.y", "A.z"]


def test_no_two_rooms_import_each_other() -> None:
    edges = {(room_of(file), imported) for file in modules() for imported in imported_rooms(file)}
    pairs = {(a, b) for a, b in edges if a != b and (b, a) in edges and "__init__" not in (a, b)}
    assert not pairs


CHANGES_DISK = {"unlink", "rmtree", "rmdir", "rename", "removedirs", "truncate", "ftruncate", "move", "write_bytes"}
WRITES_INTO_A_DRAFT = {"models/export.py", "checkpoint/write.py"}  # new files in a folder that nobody has seen yet
APPENDS = {"run/tracking.py", "data/bad_samples.py"}


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_one_room_deletes_replaces_and_cuts(file: Path) -> None:
    name = file.relative_to(PACKAGE).as_posix()
    if name.startswith("files/"):
        return
    tree = ast.parse(file.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    changing = {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)} & CHANGES_DISK
    if name not in WRITES_INTO_A_DRAFT:
        changing |= {call.func.attr for call in calls if call.func.attr == "write_text"}
    modes = {
        argument.value
        for call in calls
        if call.func.attr == "open"
        for argument in [*call.args, *(keyword.value for keyword in call.keywords)]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    }
    allowed = {"a"} if name in APPENDS else {"wb"} if name == "data/caches/folder.py" else set()
    assert not changing, f"{name} changes files by {changing}: accel_clip/files does"
    assert not {mode for mode in modes if set(mode) & set("wax+") and len(mode) <= 3} - allowed


@pytest.mark.parametrize(
    "module", ["accel_clip", "accel_clip.cli", "accel_clip.command_line", "accel_clip.run.preconditions"]
)
def test_light_modules_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'open_clip', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def is_dataclass(node: ast.ClassDef) -> bool:
    """Return whether a class is decorated by `dataclass`, with or without arguments."""
    called = (each.func if isinstance(each, ast.Call) else each for each in node.decorator_list)
    return any(isinstance(each, ast.Name) and each.id == "dataclass" for each in called)


def untold_fields(tree: ast.AST) -> list[str]:
    """Return the fields of dataclasses under which no string says what they mean."""
    untold = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and is_dataclass(node):
            for field, below in zip(node.body, [*node.body[1:], None], strict=True):
                is_told = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and not is_told:
                    untold.append(f"{node.name}.{ast.unparse(field.target)}")
    return untold


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_string_under_each_field_says_what_it_means(file: Path) -> None:
    assert not untold_fields(ast.parse(file.read_text(encoding="utf-8")))


def test_a_field_without_a_string_is_found() -> None:
    code = '@dataclass(frozen=True)\nclass A:\n    x: int\n    """edge"""\n    y: int = 0\n    z: int\n    """depth"""'
    assert untold_fields(ast.parse(code)) == ["A.y"]


def named_twice() -> dict[str, set[str]]:
    """Return the names of functions and classes that several modules define, with the modules."""
    places: dict[str, set[str]] = {}
    for file in modules():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                places.setdefault(node.name, set()).add(file.relative_to(PACKAGE).as_posix())
    return {name: where for name, where in places.items() if len(where) > 1}


def test_a_name_means_one_thing() -> None:
    assert named_twice() == {}


REDUCES = {"DistributedDataParallel", "no_sync", "trigger_sync_in_backward", "sync_gradients"}


def words_of(file: Path) -> set[str]:
    """Return every name that the code of a module imports, reads or takes from an object."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    read = {node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in nodes}
    return read | {node.name.rpartition(".")[2] for node in nodes if isinstance(node, ast.alias)}


def test_one_file_knows_how_gradients_are_reduced() -> None:
    """So that another way of dividing a model among processes is a second class beside it, and not a second trainer."""
    users = {file.relative_to(PACKAGE).as_posix() for file in modules() if words_of(file) & REDUCES}
    assert users == {"models/data_parallel.py"}
