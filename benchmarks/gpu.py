"""python benchmarks/gpu.py

Whether training is right and fast on the GPU of this machine: one command, a table of what is expected and what was
seen, as text and as JSON. `--dry-run` runs the checks in small sizes on the CPU. Exit code 0 where all holds, 1 where
something does not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

AT_ONCE = ("machine", "gradients", "plans", "loss", "waits", "demo", "resume", "half", "losses", "processes")
"""Checks that look at no clock, several of which may share the GPU."""


def main() -> int:
    """Run the checks that were asked for, and print what they saw."""
    from gpu_checks import CHECKS

    parser = argparse.ArgumentParser(description="What is right and how fast, on this machine's GPU")
    parser.add_argument("--only", nargs="*", choices=[*CHECKS], default=[*CHECKS], help="checks to run")
    parser.add_argument("--dry-run", action="store_true", help="small sizes on the CPU")
    parser.add_argument("--json", type=Path, help="file for the table")
    parser.add_argument("--seconds", type=float, default=300, help="that a check may take")
    parser.add_argument("--at-once", type=int, default=5, help="checks beside each other that look at no clock")
    parser.add_argument("--run-one", choices=[*CHECKS], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not (given.dry_run or torch.cuda.is_available()):
        print("no GPU here: --dry-run tries the checks on the CPU", file=sys.stderr)
        return 2
    if given.run_one:
        return run_one(given.run_one, "cpu" if given.dry_run else "cuda")
    rows = all_rows(given)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    failed = [row for row in rows if row["holds"] is False]
    print(f"{len(rows)} rows, {len(failed)} not as expected")
    return 1 if failed else 0


def run_one(name: str, device: str) -> int:
    """Run one check and write a line of JSON for each row."""
    from gpu_checks import CHECKS, Machine

    for row in CHECKS[name](Machine(device)):
        print("ROW " + json.dumps(asdict(row)), flush=True)
    return 0


def all_rows(given: argparse.Namespace) -> list[dict[str, object]]:
    """Run the checks, those that look at a clock one after the other, and return their rows."""
    rows: list[dict[str, object]] = []
    beside = [name for name in given.only if name in AT_ONCE]
    with ThreadPoolExecutor(given.at_once) as pool:
        for name, found in zip(beside, pool.map(lambda name: rows_of(name, given), beside), strict=True):
            rows += shown(name, found)
    for name in given.only:
        if name not in AT_ONCE:
            rows += shown(name, rows_of(name, given))
    return rows


def rows_of(name: str, given: argparse.Namespace) -> list[dict[str, object]]:
    """Return what a check saw in a process of its own; one that fails or takes too long is a row that does not hold."""
    command = [sys.executable, __file__, "--run-one", name, *(["--dry-run"] if given.dry_run else [])]
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=given.seconds, check=False)
        output, problem = done.stdout, "" if done.returncode == 0 else done.stderr.strip()[-1500:]
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        problem = f"not done after {given.seconds:.0f} s"
    rows = [json.loads(line.removeprefix("ROW ")) for line in output.splitlines() if line.startswith("ROW ")]
    if problem:
        rows.append({"what": f"the check '{name}'", "expected": "comes to its end", "seen": problem, "holds": False})
    seconds = round(time.perf_counter() - begin, 1)
    return [{"check": name, "seconds": seconds, **row} for row in rows]


def shown(name: str, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Print the rows of a check as lines of a table and return them."""
    words = {True: "yes", False: "NO", None: ""}
    for row in rows:
        print(f"| {name} | {row['what']} | {row['expected']} | {row['seen']} | {words[row['holds']]} |", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
