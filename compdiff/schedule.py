"""Steps side by side: each as soon as what it reads is done, on its share of the cores.

A small model gains little from a second thread: two trainings side by side, on one core each, are done in two thirds of
the time that they take one after the other on both.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Event, current_thread, main_thread
from typing import TypeVar

import psutil

from compdiff.request import Request
from compdiff.stages import Step, before

T = TypeVar("T")
GLANCE = 0.2  # seconds between two looks at whether Ctrl-C was pressed
NOTEBOOK = 1.5 * 2**30  # bytes of memory that one may need at demo size


def depths(steps: Sequence[Step]) -> dict[str, int]:
    """{label: how many steps lie before it, one behind the other}; the steps come in order."""
    depth: dict[str, int] = {}
    for step in steps:
        depth[step.label] = 1 + max((depth[other.label] for other in before(step, list(steps))), default=0)
    return depth


def widest(steps: Sequence[Step]) -> int:
    """How many of the steps can go side by side: the most that lie equally deep."""
    return max(Counter(depths(steps).values()).values(), default=1)


def jobs(request: Request, todo: Sequence[Step]) -> int:
    """Notebooks at a time: JOBS, else one for each core that free memory allows; no more than `todo` has side by side.

    At paper size one at a time has the GPU.
    """
    room = max(1, int(psutil.virtual_memory().available // NOTEBOOK))
    return min(request.jobs or min(_most(request), room), widest(todo))


def threads(request: Request, every: Sequence[Step]) -> dict[str, int]:
    """{label: threads}: the cores divided among the steps that lie equally deep, among JOBS of them at most.

    0 = as many as torch likes, for a step without company or where OMP_NUM_THREADS is set. The sums of a training are
    split among its threads, and so are its last bits: the number depends on the request and the machine's cores alone,
    never on what is done already, what else runs now or how much memory is free, and a training that goes on after
    an interruption ends as it would have without.
    """
    depth = depths(every)
    equal = Counter(depth.values())
    share = {label: min(request.jobs or _most(request), equal[d]) for label, d in depth.items()}
    given = "OMP_NUM_THREADS" in os.environ
    return {label: 0 if given or n == 1 else max(1, (os.cpu_count() or 1) // n) for label, n in share.items()}


def _most(request: Request) -> int:
    return 1 if request.profile == "paper" else os.cpu_count() or 1


def carry_out(
    steps: Sequence[Step], work: Callable[[Step, Event], T], jobs: int, told: Callable[[Step, T | BaseException], None]
) -> None:
    """`work` on every step, `jobs` at a time, none before what it reads; `told` (step, result) in the order of ending.

    All trainings go before the first generation, all generations before the first figure: so that at the end, too,
    there is more than one to do.
    If one fails, `told` gets the error; nothing new begins, but what is going goes on to its end. Then the first error
    is raised, with further ones as its notes. On Ctrl-C the event that `work` was given is set; KeyboardInterrupt comes
    when all have ended, and a second Ctrl-C changes nothing.
    """
    depth, stopping, going, failed = depths(steps), Event(), dict[Future, Step](), list[BaseException]()
    waiting = sorted(steps, key=lambda step: depth[step.label])
    with interrupts() as seen, ThreadPoolExecutor(jobs) as pool:
        try:
            while going or (waiting and not seen):
                if seen and not stopping.is_set():
                    stopping.set()
                    waiting.clear()
                    print(f"ending {_notebooks(going)}, up to 10 s", flush=True)
                unfinished = [*waiting, *going.values()]
                for step in [s for s in waiting if not before(s, unfinished)][: jobs - len(going)]:
                    waiting.remove(step)
                    going[pool.submit(work, step, stopping)] = step
                for done in wait(going, GLANCE, return_when=FIRST_COMPLETED).done:
                    step = going.pop(done)
                    if seen:
                        continue
                    if error := done.exception():
                        failed.append(error)
                        waiting.clear()
                    told(step, error or done.result())
                    if error and going:
                        print(f"nothing new begins; {_notebooks(going)} still at work (Ctrl-C ends them)", flush=True)
        finally:
            stopping.set()
    if seen:
        raise KeyboardInterrupt
    for further in failed[1:]:
        failed[0].add_note(f"failed too: {further}")
    if failed:
        raise failed[0]


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Ctrl-C as a list that grows. As an exception it could strike `wait` while that holds a lock of a future, which
    nobody would give back: the threads would never end. Where Ctrl-C is ignored, or in another thread, it stays so.
    """
    seen: list[int] = []
    if current_thread() is not main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield seen
        return
    usual = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, usual)


def _notebooks(some: Collection[object]) -> str:
    return f"{len(some)} notebook{'s' * (len(some) > 1)}"
