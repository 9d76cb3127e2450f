"""Provenance and safe writing: atomic files, content hashes, the tidy results format, one `run.json` per artefact."""

from __future__ import annotations

import ast
import contextlib
import datetime
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
from safetensors import SafetensorError

from compdiff import paths

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "pandas", "scipy", "scikit-learn",
            "botorch", "gpytorch", "torchmetrics", "papermill")  # fmt: skip
PARSING = threading.Lock()

# One long format for every number of the project (06, 07), so that 08 builds all tables from one place.
RESULT_COLUMNS = (
    "dataset",  # chest | fundus | nih | ...
    "seed",  # training seed
    "stage",  # quality | alignment | probe | judges | measured | memorisation | difference | downstream
    "method",  # a key of config.METHODS, or a control: real_train, vae, untrained, shuffled, copy
    "setting",  # synthetic set (test, balanced) or downstream strategy (1a, 1b, ...)
    "group_kind",  # overall | an attribute's name | cell | held_out
    "group",  # "" | category | cell name
    "metric",  # FID, KID, ES-FID, ...; the extractor has its own column
    "value",  # number, or empty where `note` says why there is none
    "lo",  # 95 % interval, empty where none was computed
    "hi",
    "n",  # images judged
    "n_ref",  # reference images
    "extractor",  # lite0 | a judge's name | pixels | ""
    "note",  # "ineligible: n < 30", "not available: ...", ""
)


NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "no file may be so large here",
}


@contextlib.contextmanager
def atomic(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` only if the block succeeds.

    `durable` waits for the disk, so that a power cut cannot leave an empty file; thousands of small images go without.
    OSError names `path` and the remedy where there is no room for it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if durable:
            with open(temporary, "rb") as done:
                os.fsync(done.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        said = re.search(r"\(os error (\d+)\)", str(error))  # safetensors keeps the number in its words only
        number = int(said[1]) if said else getattr(error, "errno", None)
        if number not in NO_ROOM:
            raise
        remedy = "make room, or set RUNS= to a folder on another disk, and run again: what is finished is kept"
        raise OSError(number, f"{NO_ROOM[number]}; {remedy}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(content: object) -> str:
    """Hash of a JSON-like value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def results(rows: list[dict], **common: object) -> pd.DataFrame:
    """Rows -> tidy frame with exactly RESULT_COLUMNS; an unknown column raises, an absent one stays empty."""
    for row in rows:
        unknown = set(row) | set(common)
        unknown -= set(RESULT_COLUMNS)
        if unknown:
            raise ValueError(f"unknown result columns {sorted(unknown)}; known: {list(RESULT_COLUMNS)}")
    return pd.DataFrame([{**common, **row} for row in rows], columns=list(RESULT_COLUMNS))


def save_results(frame: pd.DataFrame, path: Path) -> None:
    """Write a tidy results frame atomically as CSV, six significant digits."""
    with atomic(path) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.6g")


def load_results(paths: list[Path]) -> pd.DataFrame:
    """Concatenate tidy results files (strings stay strings: "" is not NaN there)."""
    numbers = {"value": float, "lo": float, "hi": float, "n": float, "n_ref": float, "seed": int}
    text = {c: str for c in RESULT_COLUMNS if c not in numbers}
    frames = [
        pd.read_csv(p, dtype=numbers | text, keep_default_na=False, na_values={k: [""] for k in numbers}) for p in paths
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(RESULT_COLUMNS))


# --- source code, blind to comments -----------------------------------------------------------------------------
def parsed(text: str) -> ast.Module:
    """`ast.parse`, by one thread at a time: notebooks side by side hash their code in threads, and before 3.11.8 Python
    counts the depth of all threads in one number ("recursion depth mismatch"; cpython issue 106905)."""
    with PARSING:
        return ast.parse(text)


def plain_source(text: str) -> str:
    """Python source without comments, docstrings and layout: what can change a result. SyntaxError if it is none."""
    tree = parsed(text)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def source_sha256(path: Path) -> str:
    """Hash of a Python file that stays the same when only comments, docstrings or layout change."""
    return hashlib.sha256(plain_source(Path(path).read_text()).encode()).hexdigest()


# --- what lies on the disk ----------------------------------------------------------------------------------------
def fingerprint(path: Path) -> dict[str, object]:
    """{"sha256", "size", "modified"} of a file; {"sha256", "n"} of a folder, over its files' names and sizes only."""
    path = Path(path)
    if path.is_dir():
        files = sorted((e.name, e.stat().st_size) for e in os.scandir(path) if e.is_file())
        return {"sha256": sha256_json(files), "n": len(files)}
    status = path.stat()
    return {"sha256": sha256_file(path), "size": status.st_size, "modified": status.st_mtime_ns}


def unchanged(path: Path, known: Mapping[str, object]) -> bool:
    """Does `path` still have the fingerprint `known`? A file of the same size and time is not read again."""
    path = Path(path)
    if not path.exists():
        return False
    if path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) == (known.get("size"), known.get("modified")):
        return True
    return fingerprint(path)["sha256"] == known["sha256"]


# --- run.json -----------------------------------------------------------------------------------------------------
class Run:
    """Provenance of one artefact: filled in while it is made, written by `finish`."""

    def __init__(
        self, file: Path, inputs: Mapping[str, object], parameters: Mapping[str, object], seeds: Sequence[int]
    ):
        self.file = Path(file)
        self.content: dict[str, object] = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "parameters": dict(parameters),
            "seeds": list(seeds),
            "inputs": dict(inputs),
            "versions": versions(),
        }
        self.outputs: list[Path] = []  # files and folders below the folder of `base`
        self.base = self.file.parent
        self.peak_mib = 0.0  # of another process, where the work is done in one
        self.threads = 0  # that it was given, where it was not alone
        self._start = time.monotonic()

    def finish(self) -> None:
        """Hash the outputs and write the file (last, so that it stands only beside a finished artefact)."""
        minutes = round((time.monotonic() - self._start) / 60, 3)
        outputs = {os.path.relpath(p, self.base): fingerprint(p) for p in self.outputs}
        self.content |= {
            "minutes": minutes,
            "peak_memory_mib": round(self.peak_mib or peak_mib()),
            "machine": machine() | ({"threads": self.threads} if self.threads else {}),
        }
        write_json(self.file, without_places(self.content) | {"outputs": outputs})


@contextlib.contextmanager
def run_json(folder: Path, inputs: Mapping[str, object], parameters: Mapping[str, object] | None = None,
             seeds: Sequence[int] = ()) -> Iterator[Run]:  # fmt: skip
    """Make `<folder>/run.json` when the block succeeds; an old one goes first, so a failure leaves none.

    Inside the block append the files that it made to `run.outputs`. `folder` may also name a .json file itself.
    """
    file = Path(folder) if Path(folder).suffix == ".json" else Path(folder) / "run.json"
    file.unlink(missing_ok=True)
    run = Run(file, inputs, parameters or {}, seeds)
    yield run
    run.finish()


def read_run(folder: Path) -> dict | None:
    """The content of `<folder>/run.json` (or of that file), None where there is none that can be read."""
    file = Path(folder) if Path(folder).suffix == ".json" else Path(folder) / "run.json"
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def outputs_sha256(run: Mapping) -> str:
    """One hash over all that a run.json lists as made: two runs that have it in common made the same files."""
    return sha256_json({name: entry["sha256"] for name, entry in run["outputs"].items()})


def is_current(folder: Path, inputs: Mapping[str, object]) -> bool:
    """Was `folder` made from the same inputs, and does it still hold what was made?"""
    known = read_run(folder)
    if known is None or known["inputs"] != without_places(dict(inputs)):
        return False
    return all(unchanged(Path(folder) / name, entry) for name, entry in known["outputs"].items())


def without_places(content: object) -> object:
    """`content` as JSON would return it, paths cut to their last name: no home folder, no user name."""
    if isinstance(content, Mapping):
        return {str(k): without_places(v) for k, v in content.items()}
    if isinstance(content, list | tuple | set):
        return [without_places(v) for v in content]
    if isinstance(content, Path) or (isinstance(content, str) and content.startswith(("/", "~", "../"))):
        return Path(content).name
    return content


def commit() -> str:
    """Git commit of the repository, with "+changes" where the tree differs from it, but for figures/, which the runs
    themselves write; "unknown" without git."""
    git = ["git", "-C", str(paths.ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "--", ".", ":!figures"], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def peak_mib() -> float:
    """Largest memory that this process has held so far, MiB (macOS counts in bytes, Linux in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def machine() -> dict[str, object]:
    """Processor, cores and accelerator; neither host nor user."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {"cpu": (models or [platform.machine()])[0], "cores": os.cpu_count(), "accelerator": accelerator()}


def accelerator() -> str:
    """Name of the first GPU, or "none". Asks the driver, so that torch need not be loaded."""
    if not (tool := shutil.which("nvidia-smi")):
        return "none"
    answer = subprocess.run([tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout.strip() else "none"
