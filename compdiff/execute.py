"""One notebook through papermill, in a process of its own: its peak memory can be told and Ctrl-C ends it cleanly.

The kernel is always this interpreter's, whatever kernels, start-up files or settings the user has.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import psutil

from compdiff import paths, record

KERNEL_STARTS = 300  # seconds that a kernel may take to answer: on a machine with much else to do a minute is too few
DIED = "the kernel died, most often because memory ran out (try JOBS=1, then a smaller MICROBATCH or SAMPLE_BATCH)"


class Stopped(Exception):
    """The run ended before the notebook did."""


class Failed(Exception):
    """A notebook raised; `kept` is the notebook with its output up to there."""

    def __init__(self, message: str, kept: Path):
        super().__init__(f"{message}\nkept with its output: {os.path.relpath(kept)}")


def declared(notebook: Path) -> list[str]:
    """Names in the notebook's cell tagged `parameters`; none when it has no such cell or names no kernel."""
    import papermill

    try:
        return list(papermill.inspect_notebook(str(notebook)))
    except ValueError:  # no kernel in the notebook's metadata
        return []


def failed_path(target: Path) -> Path:
    return target.with_suffix(".failed.ipynb")


def run_notebook(source: Path, target: Path, parameters: Mapping[str, object], cwd: Path, env: Mapping[str, str],
                 stopping: threading.Event) -> float:  # fmt: skip
    """Execute `source`; `target` appears only on success. Returns the peak memory in MiB. Failed if a cell raises.

    Stopped soon after another thread has set `stopping`; the kernel has ended then.
    """
    kept = failed_path(target)
    for old in (*target.parent.glob(f".{target.name}.*"), kept):
        old.unlink(missing_ok=True)
    with record.atomic(target) as temporary, tempfile.TemporaryDirectory() as scratch:
        job = Path(scratch) / "job.json"
        job.write_text(
            json.dumps({"source": str(source), "target": str(temporary), "parameters": parameters, "cwd": str(cwd)})
        )
        code, peak, noise = _wait([sys.executable, "-m", "compdiff.execute", str(job)], Path(scratch), env, stopping)
        if code:
            os.replace(temporary, kept)
            answer = job.with_name("error.txt")
            raise Failed(
                answer.read_text() if answer.exists() else f"papermill stopped with code {code}:\n{noise}", kept
            )
    return peak


def _wait(words: list[str], scratch: Path, env: Mapping[str, str], stopping: threading.Event) -> tuple[int, float, str]:
    """Run a command to its end: (exit code, peak MiB of it and all below it, end of its stderr)."""
    log = scratch / "stderr.txt"
    with open(log, "w") as stderr:
        child = subprocess.Popen(words, cwd=paths.ROOT, env={**os.environ, **env}, stdin=subprocess.PIPE, stdout=stderr,
                                 stderr=stderr, start_new_session=True)  # fmt: skip
        try:
            while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
                if stopping.wait(0.1):
                    stop(child)
                    raise Stopped
        finally:
            child.stdin.close()
        _, status, usage = ended
        child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), log.read_text()[-2000:]


def stop(child: subprocess.Popen, patience: float = 10) -> None:
    """Ctrl-C for papermill, then the end of it and of its kernel, which may be deaf to Ctrl-C."""
    with contextlib.suppress(psutil.NoSuchProcess):
        kernels = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=patience)
        for process in (*psutil.wait_procs(kernels, timeout=1)[1], child):
            process.kill()


# --- the process --------------------------------------------------------------------------------------------------
def own_kernel(folder: Path) -> None:
    """Make `python3` mean this interpreter, and keep the user's Jupyter and IPython settings out."""
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "language": "python",
        "display_name": "Python 3",
    }
    file = folder / "jupyter" / "kernels" / "python3" / "kernel.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(spec))
    os.environ |= {"JUPYTER_PATH": str(folder / "jupyter"), "IPYTHONDIR": str(folder / "ipython")}


def end_with_parent() -> None:
    """Stop like Ctrl-C when the process that holds the other end of stdin is gone."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGINT)


def explain(error: object, source: Path) -> str:
    """A papermill error in words: which cell, its first line, the end of the traceback."""
    cells = ["".join(c["source"]) for c in json.loads(source.read_text())["cells"]]
    place = (
        f"cell {cells.index(error.source) + 1} of {len(cells)}" if error.source in cells else "the injected parameters"
    )
    trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).rstrip().splitlines()
    first = next((line for line in error.source.splitlines() if line.strip()), "")
    return "\n".join(
        [f"{source.name}, {place} (In [{error.exec_count}]): {first}", *(f"    {line}" for line in trace[-6:])]
    )


def main(job_file: Path) -> int:
    job = json.loads(job_file.read_text())
    own_kernel(job_file.parent)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a script starts with SIGINT ignored
    threading.Thread(target=end_with_parent, daemon=True).start()
    import papermill
    from nbclient.exceptions import DeadKernelError

    answer = job_file.with_name("error.txt")
    try:
        papermill.execute_notebook(
            job["source"], job["target"], job["parameters"], kernel_name="python3", language="python",
            progress_bar=False, cwd=job["cwd"], start_timeout=KERNEL_STARTS,
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        answer.write_text(explain(error, Path(job["source"])))
    except DeadKernelError:
        answer.write_text(f"{Path(job['source']).name}: {DIED}")
    except KeyboardInterrupt:
        return 130
    return 1 if answer.exists() else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
