"""Tasks -> shards: parallel over images, bounded in memory, and resumable after a kill.

A task makes one image. Threads make them ahead (decoding, resampling and compression let go of Python's lock), one
writer puts them into tars in the tasks' own order: the number of threads changes no byte. Beside every finished tar
lies a note with the hash of all that went into it; a later run keeps the tars whose note and content still fit.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from compdiff import record, shards
from compdiff.progress import interactive


@dataclass(frozen=True)
class Task:
    """One image to make. `made_from`: JSON-like, all that its bytes depend on besides code and settings."""

    split: str
    made_from: object
    make: Callable[[], tuple[dict, np.ndarray]]  # -> row, uint8 [size, size]; Rejected where the image is left out


class Rejected(Exception):
    """An image that the manifest lets go: its new name, the reason, and where the table has it."""

    def __init__(self, id: str, reason: str, where: str):
        super().__init__(reason)
        self.id, self.reason, self.where = id, reason, where


def write(folder: Path, tasks: Sequence[Task], size: int, common: object, workers: int = 0) -> tuple[list, list, list]:
    """Tasks, grouped by split, -> `folder`/shards/<split>-000000.tar ...; returns (rows, index entries, rejects).

    common: all that every image depends on (settings, code). workers: threads, 0 = one per core. Keeps finished tars.
    """
    rows: list[dict] = []
    entries: list[dict] = []
    rejects: list[dict] = []
    seen: set[str] = set()
    with tqdm(total=len(tasks), unit="image", disable=not interactive()) as bar:
        for split, group in itertools.groupby(tasks, key=lambda task: task.split):
            if split in seen:
                raise ValueError(f"split {split!r} comes in two pieces")
            seen.add(split)
            mine = list(group)
            for k, start in enumerate(range(0, len(mine), per := shards.per_shard(size))):
                file = folder / "shards" / f"{split}-{k:06d}.tar"
                note = _part(file, mine[start : start + per], common, workers or os.cpu_count() or 1, bar)
                rows += note["rows"]
                rejects += note["rejects"]
                if note["rows"]:
                    name = f"shards/{file.name}"
                    entries.append({"file": name, "split": split, "n": len(note["rows"]), "sha256": note["sha256"]})
                else:
                    file.unlink()
    return rows, entries, rejects


def _note(file: Path) -> Path:
    return file.with_name(f".{file.name}.json")


def _part(file: Path, tasks: Sequence[Task], common: object, workers: int, bar: tqdm) -> dict:
    """One tar and its note, kept from an earlier run where both still fit."""
    key = record.sha256_json([common, [[task.split, task.made_from] for task in tasks]])
    try:
        note = json.loads(_note(file).read_text())
        if note["key"] == key and record.sha256_file(file) == note["sha256"]:
            bar.update(len(tasks))
            return note
    except (OSError, ValueError):
        pass
    note = {"key": key, "rows": [], "rejects": []}

    def samples() -> Iterator[tuple[dict, bytes]]:
        for row, content in _in_order(tasks, workers):
            bar.update()
            if isinstance(content, str):
                note["rejects"].append(row | {"reason": content})
            else:
                note["rows"].append(row)
                yield row, content

    shards.write(file, samples())
    note["sha256"] = record.sha256_file(file)
    record.write_text(_note(file), json.dumps(note))  # rows keep the order of their columns
    return note


def _in_order(tasks: Iterable[Task], workers: int) -> Iterator[tuple[dict, bytes | str]]:
    """(row, PNG file) or ({"id", "row"}, reason) of every task, in order; at most 2 per thread are in memory."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(_make, task))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _make(task: Task) -> tuple[dict, bytes | str]:
    try:
        row, image = task.make()
    except Rejected as error:
        return {"id": error.id, "row": error.where}, error.reason
    return row, shards.encode_png(image)


def finished(folder: Path) -> bool:
    """Does `folder` hold a tar that a later run can keep?"""
    return any((folder / "shards").glob(".*.json"))


def clear_notes(folder: Path, entries: Sequence[dict]) -> None:
    """Remove the notes, and tars that are no part of the result."""
    wanted = {folder / entry["file"] for entry in entries}
    for path in (folder / "shards").iterdir():
        if path not in wanted:
            path.unlink()
