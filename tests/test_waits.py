"""Places that may wait: each is known, and either looks at the stop signal and the watchdog or cannot take long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import accel_clip

PACKAGE = Path(accel_clip.__file__).parent

ALWAYS = {
    *("recv", "accept", "sleep", "communicate", "check_output", "check_call", "urlopen", "create_connection"),
    *("DataLoader", "ThreadPoolExecutor", "ProcessPoolExecutor", "Pool", "input", "serve_forever"),
    *(
        "Client",
        "AsyncClient",
        "ConnectionPool",
        "HTTPProxy",
        "SOCKSProxy",
        "getaddrinfo",
        "flock",
        "lockf",
        "waitpid",
        "system",
        "as_completed",
        "synchronize",
    ),
    *("create_model", "get_tokenizer", "load_state_dict_from_url", "hf_hub_download", "snapshot_download"),
    *("load_dataset", "upload_folder", "create_repo", "init_trackers", "end_training"),
}
"""calls that wait whatever they are given"""
WITHOUT_TIMEOUT = {"result", "join", "wait", "get", "acquire", "run"}
"""calls that wait for ever when they are given nothing (`run`: of subprocess, without a timeout)"""
COLLECTIVE = {"gather", "reduce", "broadcast", "broadcast_object_list", "gather_object", "wait_for_everyone", "barrier"}
"""calls in which processes wait for each other, of Accelerate and torch.distributed"""

MEETS = "every process comes here in every step, round or start, and the watchdog ends those that wait for a hung one"
STARTS = "before a run: a signal interrupts the call itself, or ends the process ten seconds later"
WORKERS = "mostly in loader workers, which are ended; else after a step at most as long as `Patience` says"
SHORT = "bounded, by a time-out or by what there is to do"
KNOWN = {
    ("checkpoint/background.py", "ThreadPoolExecutor"): "the thread that writes checkpoints: see `result` below",
    ("checkpoint/background.py", "result"): "a checkpoint is finished whoever asks to stop; watched as all else",
    ("checkpoint/background.py", "wait"): "the same",
    ("checkpoint/find.py", "broadcast"): MEETS,
    ("checkpoint/snapshot.py", "gather"): MEETS,
    ("data/bad_samples.py", "gather_object"): MEETS,
    ("data/caches/feature_encoding.py", "gather"): MEETS,
    ("data/caches/feature_encoding.py", "gather_object"): MEETS,
    ("data/caches/feature_encoding.py", "wait_for_everyone"): MEETS,
    ("data/feed_parts.py", "gather_object"): MEETS,
    ("data/caches/items.py", "broadcast_object_list"): MEETS,
    ("data/caches/picture_building.py", "broadcast_object_list"): MEETS,
    ("data/sources/connections.py", "ConnectionPool"): WORKERS,
    ("data/sources/hub.py", "load_dataset"): STARTS,
    ("data/sources/hub_stream.py", "load_dataset"): STARTS,
    ("data/sources/hub_stream.py", "sleep"): WORKERS,
    ("data/sources/remote_file.py", "sleep"): WORKERS,
    ("data/sources/shards/reader.py", "sleep"): WORKERS,
    ("data/workers.py", "DataLoader"): "the one loader of the package: `received` looks every second",
    ("commands/evaluate.py", "end_training"): MEETS,
    ("evaluation/encode.py", "gather"): MEETS,
    ("evaluation/encode.py", "gather_object"): MEETS,
    ("evaluation/retrieval.py", "reduce"): MEETS,
    ("evaluation/validation.py", "reduce"): MEETS,
    ("commands/export.py", "create_repo"): "a command of its own, which a signal interrupts",
    ("models/export.py", "get_tokenizer"): "its files are here, the hub is not asked",
    ("commands/export.py", "upload_folder"): "a command of its own, which a signal interrupts",
    ("files/lock.py", "lockf"): "does not wait: it is asked whether the lock is free",
    ("files/lock.py", "sleep"): SHORT,
    ("evaluation/base.py", "broadcast_object_list"): MEETS,
    ("run/agreement.py", "reduce"): MEETS,
    ("run/non_finite.py", "gather"): MEETS,
    ("run/resumable.py", "wait_for_everyone"): MEETS,
    ("losses/gradient.py", "gather"): MEETS,
    ("losses/pair_terms.py", "reduce"): MEETS,
    ("losses/tiles.py", "gather"): MEETS,
    ("meters.py", "reduce"): MEETS,
    ("models/build.py", "create_model"): STARTS,
    ("models/build.py", "get_tokenizer"): STARTS,
    ("models/training_model.py", "broadcast"): MEETS,
    ("process/network.py", "create_connection"): SHORT,
    ("step/plan.py", "gather"): MEETS,
    ("commands/check/speed.py", "synchronize"): SHORT,
    ("process/accelerator.py", "gather"): MEETS,
    ("process/accelerator.py", "gather_object"): MEETS,
    ("run/rebuilding.py", "get_tokenizer"): STARTS,
    ("checkpoint/saver.py", "wait_for_everyone"): MEETS,
    (
        "run/tracking.py",
        "init_trackers",
    ): "before the first step, where a stop that is not heard interrupts",
    ("trainer.py", "end_training"): MEETS,
    ("process/waiting.py", "gather"): MEETS,
    ("process/signals.py", "sleep"): SHORT,
    ("process/watchdog.py", "sleep"): SHORT,
}


def calls() -> Iterator[tuple[str, str]]:
    """Yield the calls of the package that may wait: in which file, and what is called."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for name in waits_in(ast.parse(file.read_text(encoding="utf-8"))):
            yield file.relative_to(PACKAGE).as_posix(), name


def waits_in(tree: ast.AST) -> list[str]:
    """Return what is called in a module that may wait, in its order."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and may_wait(node)]
    return [called(call)[1] for call in sorted(found, key=lambda call: (call.lineno, call.col_offset))]


def called(call: ast.Call) -> tuple[str, str]:
    """Return what a function is taken from, and its name."""
    function = call.func
    if isinstance(function, ast.Attribute):
        return ast.unparse(function.value), function.attr
    return "", getattr(function, "id", "")


def may_wait(call: ast.Call) -> bool:
    owner, name = called(call)
    if name == "run":
        return owner == "subprocess" and "timeout" not in {keyword.arg for keyword in call.keywords}
    if name in ("gather", "reduce", "broadcast"):
        return owner.endswith(("accelerator", "distributed", "processes", "report")) or not (owner or name == "reduce")
    is_bare = not call.args and not call.keywords
    return name in ALWAYS or name in COLLECTIVE or (name in WITHOUT_TIMEOUT and is_bare)


def test_every_wait_is_known() -> None:
    found = set(calls())
    new, gone = sorted(found - set(KNOWN)), sorted(set(KNOWN) - found)
    assert not new, (
        f"these may wait: let them look at the stop signal (accel_clip/process/waiting.py), or say why not: {new}"
    )
    assert not gone, f"these are no longer there: {gone}"


def test_waits_are_found_wherever_they_stand() -> None:
    code = """
def one(queue, thread, lock, future):
    queue.get(), queue.get(timeout=1)
    ", ".join([])
    thread.join(), thread.join(1.0)
    {}.get("key")
    lock.acquire()
    future.result(), future.result(3), console.result("text")
    [batch for batch in torch.utils.data.DataLoader(items)]
    subprocess.run(["ls"]), subprocess.run(["ls"], timeout=1), trainer.run()
    self.accelerator.gather(rows), numbers.reduce(2), torch.distributed.barrier()
    lambda: time.sleep(1)
"""
    found = waits_in(ast.parse(code))
    assert found == ["get", "join", "acquire", "result", "DataLoader", "run", "gather", "barrier", "sleep"]
