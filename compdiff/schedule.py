"""Steps side by side: each as soon as what it reads is done, on its share of the cores.

A small model gains little from a second thread: two trainings side by side, on one core each, are done in two thirds of
the time that they take one after the other on both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Event
from typing import TypeVar

from compdiff.stages import Step, before

T = TypeVar("T")


def depths(steps: Sequence[Step]) -> dict[str, int]:
    """{label: how many steps lie before it, one behind the other}; the steps come in order."""
    depth: dict[str, int] = {}
    for step in steps:
        depth[step.label] = 1 + max((depth[other.label] for other in before(step, list(steps))), default=0)
    return depth


def widest(steps: Sequence[Step]) -> int:
    """How many of the steps can go side by side: the most that lie equally deep."""
    return max(Counter(depths(steps).values()).values(), default=1)


def carry_out(
    steps: Sequence[Step], work: Callable[[Step, Event], T], jobs: int, told: Callable[[Step, T], None]
) -> None:
    """`work` on every step, `jobs` at a time, none before what it reads; `told` (step, result) in the order of ending.

    All trainings go before the first generation, all generations before the first figure: so that at the end, too,
    there is more than one to do.
    If one fails, or on Ctrl-C, the event that the others were given is set, and the error goes on when they have ended.
    """
    depth, stopping, going = depths(steps), Event(), dict[Future, Step]()
    waiting = sorted(steps, key=lambda step: depth[step.label])
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or going:
                unfinished = [*waiting, *going.values()]
                for step in [s for s in waiting if not before(s, unfinished)][: jobs - len(going)]:
                    waiting.remove(step)
                    going[pool.submit(work, step, stopping)] = step
                for done in wait(going, return_when=FIRST_COMPLETED).done:
                    told(going.pop(done), done.result())
        finally:
            stopping.set()
