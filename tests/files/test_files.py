"""The room that deletes and replaces: nothing that is not ours goes, and a kill leaves nothing half."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from accel_clip.faults import ConfigError
from accel_clip.files.lock import LOCK, FolderLock, held_error, is_held
from accel_clip.files.marked import (
    MARK,
    Draft,
    foreign_names,
    remove_folder,
    require_own,
    settle,
    stands_whole,
)
from accel_clip.files.names import CONDEMNED, DRAFT, REPLACED, beside, unfinished
from accel_clip.files.whole import cut, write_text
from helpers.kills import fork, killed_at, run_forked

KIND = "export"


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return everything below a folder by its name, without marks and locks: the bytes of files, None for folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name not in (MARK, LOCK)
    }


def publish(place: Path, **files: str) -> None:
    with Draft(place, KIND) as draft:
        for name, text in files.items():
            file = draft.path / name.replace("__", "/")
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        draft.publish(editable=("card",))


def test_a_folder_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    place = tmp_path / "export"
    publish(place, weights="old", tokenizer__vocabulary="a b")
    publish(place, weights="new")
    assert tree(tmp_path) == {"export": None, "export/weights": b"new"}
    assert stands_whole(place)


@pytest.mark.parametrize("number", range(40))
def test_a_kill_at_any_change_leaves_the_old_or_the_new_folder(tmp_path: Path, number: int) -> None:
    place = tmp_path / "export"
    publish(place, weights="old", card="old")
    was_killed = killed_at(number, tmp_path, lambda: publish(place, weights="new", tokenizer__vocabulary="a b"))
    settle(tmp_path, place)
    assert unfinished(tmp_path) == []
    assert stands_whole(place)
    old = {"export": None, "export/card": b"old", "export/weights": b"old"}
    new = {"export": None, "export/tokenizer": None, "export/tokenizer/vocabulary": b"a b", "export/weights": b"new"}
    assert tree(tmp_path) in ([old, new] if was_killed else [new])


@pytest.mark.parametrize("number", range(20))
def test_a_kill_at_any_change_of_a_removal_leaves_the_folder_or_nothing(tmp_path: Path, number: int) -> None:
    place = tmp_path / "pictures"
    publish(place, a="1", b="2")
    whole = tree(tmp_path)
    killed_at(number, tmp_path, lambda: remove_folder(place, KIND))
    settle(tmp_path)
    assert tree(tmp_path) in (whole, {})


@pytest.mark.parametrize("number", range(6))
def test_a_kill_while_a_file_is_replaced_leaves_the_old_or_the_new_one(tmp_path: Path, number: int) -> None:
    file = tmp_path / "config.yaml"
    write_text(file, "old")
    killed_at(number, tmp_path, lambda: write_text(file, "new"))
    settle(tmp_path)
    assert tree(tmp_path) in ({"config.yaml": b"old"}, {"config.yaml": b"new"})


FOREIGN = {
    "a file": lambda place: (place / "thesis.txt").write_text("years of work"),
    "a file in a folder": lambda place: [(place / "notes").mkdir(), (place / "notes" / "a.txt").write_text("x")],
    "an empty folder": lambda place: (place / "empty").mkdir(),
    "a link": lambda place: (place / "link").symlink_to("/etc"),
    "an edited file": lambda place: (place / "card").write_text("my own words, as many"),
    "a file that took the place of ours": lambda place: [
        (place / "card").unlink(),
        (place / "card").symlink_to("/etc/hostname"),
    ],
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_not_ours_is_refused_and_outlives_a_replacement(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "export"
    publish(place, card="our words", weights="1")
    require_own(place, KIND, "output_dir")
    FOREIGN[what](place)
    before = tree(place)
    with pytest.raises(ConfigError, match=r"^output_dir: .*export is where the export would go, and it holds"):
        require_own(place, KIND, "output_dir")
    publish(place, card="new words", weights="2")  # it came while the run went
    assert tree(tmp_path / "export.kept") == before
    assert "kept as" in capsys.readouterr().err
    assert stands_whole(place)


@pytest.mark.parametrize(
    "content", [{"thesis.txt": "x"}, {MARK: "{}"}, {MARK: '{"kind": "features", "files": {}}', "a": "b"}]
)
def test_a_folder_without_our_mark_is_never_removed(tmp_path: Path, content: dict[str, str]) -> None:
    place = tmp_path / "pictures"
    place.mkdir()
    for name, text in content.items():
        (place / name).write_text(text)
    names = {name for name in content if name != MARK}
    assert names <= set(foreign_names(place, KIND))
    remove_folder(place, KIND)
    kept = tmp_path / ("pictures.kept" if names else "pictures")
    assert {path.name for path in kept.glob("*")} - {MARK} == names or not names


def test_an_empty_folder_is_a_place_for_ours(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    require_own(tmp_path / "export", KIND, "--to")
    publish(tmp_path / "export", weights="1")
    assert tree(tmp_path) == {"export": None, "export/weights": b"1"}


def test_files_of_file_managers_do_not_matter(tmp_path: Path) -> None:
    place = tmp_path / "export"
    publish(place, weights="1")
    (place / ".DS_Store").write_bytes(b"\0")
    require_own(place, KIND, "output_dir")
    publish(place, weights="2")
    assert tree(tmp_path) == {"export": None, "export/weights": b"2"}


def test_a_link_to_another_disk_stays_a_link(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    place = tmp_path / "run" / "export"
    place.parent.mkdir()
    place.symlink_to(disk / "export")
    with pytest.raises(ConfigError, match=r"is a link to .*, which is not there: mount that"):
        require_own(place, KIND, "output_dir")
    (disk / "export").mkdir()
    publish(place, weights="1")
    assert place.is_symlink()
    assert (disk / "export" / "weights").read_text() == "1"


def test_what_looks_unfinished_and_is_not_ours_stays(tmp_path: Path) -> None:
    place = tmp_path / "export"
    for state in (DRAFT, REPLACED, CONDEMNED):
        folder = beside(place, state)
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work")
    (tmp_path / "export.old").mkdir()
    (tmp_path / "export.tmp").mkdir()
    (tmp_path / "export.old" / "mine").write_text("x")
    before = tree(tmp_path)
    publish(place, weights="1")
    settle(tmp_path)
    assert {name: content for name, content in tree(tmp_path).items() if name.split("/")[0] != "export"} == before


def test_a_draft_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    place = tmp_path / "export"
    with Draft(place, KIND) as draft:
        (draft.path / "weights").write_text("half")
        assert run_forked(lambda: settle(tmp_path)) == 0
        assert draft.path.is_dir()
        draft.publish()
    assert tree(tmp_path) == {"export": None, "export/weights": b"half"}


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "export"
    publish(place, weights="1")

    def fail() -> None:
        with Draft(place, KIND) as draft:
            (draft.path / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert tree(tmp_path) == {"export": None, "export/weights": b"1"}


def test_a_file_that_is_shorter_already_is_not_made_longer(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    cut(file, 3)
    assert not file.exists()
    file.write_text("abcdef")
    cut(file, 3)
    cut(file, 5)
    assert file.read_text() == "abc"


def test_a_replaced_file_stays_where_its_link_points(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "STATUS.json").write_text("old")
    (tmp_path / "STATUS.json").symlink_to(tmp_path / "disk" / "STATUS.json")
    write_text(tmp_path / "STATUS.json", "new")
    assert (tmp_path / "STATUS.json").is_symlink()
    assert (tmp_path / "disk" / "STATUS.json").read_text() == "new"


def hold(folder: Path, ready: Path) -> None:
    with FolderLock(folder) as lock:
        assert lock.take()
        lock.sign()
        ready.touch()
        time.sleep(600)


def test_a_lock_is_one_process_and_ends_with_it_though_its_children_live(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    holder = fork.Process(target=hold, args=(tmp_path, ready))
    holder.start()
    while not ready.exists():
        time.sleep(0.01)
    assert is_held(tmp_path)
    assert not FolderLock(tmp_path).take()
    assert f"process {holder.pid} on" in str(held_error(tmp_path))
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join()
    assert not is_held(tmp_path)
    with FolderLock(tmp_path) as lock:
        assert lock.take()
        lock.sign()
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        child = fork.Process(target=time.sleep, args=(60,))  # a loader's worker, which outlives a killed run
        child.start()
    assert run_forked(lambda: sys.exit(is_held(tmp_path))) == 0
    child.kill()
    child.join()


def test_looking_whether_a_folder_is_held_writes_nothing(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / LOCK).write_text("{}")
    os.utime(tmp_path / LOCK, (1, 1))
    assert not is_held(tmp_path)
    assert (tmp_path / LOCK).stat().st_mtime == 1
    assert (tmp_path / LOCK).read_text() == "{}"
