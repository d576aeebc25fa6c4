"""Many independent jobs: in this process while that is quick, in others once they are worth starting."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from statistics import median
from typing import Any, TypeVar

from tqdm import tqdm

from nnunet_ssl.errors import UserError

PAYS_AFTER = 10.0  # seconds of work in one process that justify starting others

Outcome = TypeVar("Outcome")


def outcomes(
    function: Callable[..., Outcome], jobs: Sequence[tuple[Any, ...]], num_processes: int
) -> Generator[Outcome, None, None]:
    """Call ``function`` with each job's arguments, and yield what it returns, as it comes, in any order.

    The first jobs are done in this process, to see how long one takes. Starting other processes costs seconds each,
    since they import nnU-Net; often the work is done before that.

    Args:
        function: of a module, so that other processes find it. It should return problems: raising ends everything.
        jobs: arguments of each call.
        num_processes: at most this many.

    Raises:
        BrokenProcessPool: a process was killed, for instance by a machine that is out of memory.
    """
    times: deque[float] = deque(maxlen=5)
    for done, job in enumerate(jobs, start=1):
        start = time.monotonic()
        yield function(*job)
        times.append(time.monotonic() - start)
        long_enough = median(times) * (len(jobs) - done) > PAYS_AFTER
        if num_processes > 1 and long_enough and (done >= 3 or times[0] > 1.0):  # the very first one may be slow
            spawned, rest = multiprocessing.get_context("spawn"), jobs[done:]
            pool = ProcessPoolExecutor(min(num_processes, len(rest)), spawned, die_with_parent)
            try:
                for future in as_completed([pool.submit(function, *job) for job in rest]):
                    yield future.result()
            finally:
                pool.shutdown(cancel_futures=True)
            return


def all_outcomes(
    function: Callable[..., Outcome], jobs: Sequence[tuple[Any, ...]], num_processes: int, title: str
) -> list[Outcome]:
    """``outcomes`` in a list, with a progress bar of this title.

    Raises:
        UserError: a process was killed.
    """
    try:
        with contextlib.closing(outcomes(function, jobs, num_processes)) as finished:
            return list(tqdm(finished, title, len(jobs)))
    except BrokenProcessPool as error:
        raise UserError(
            f"{title.lower()}: a process was killed, most likely for lack of memory. Do fewer at a time (-np 1)."
        ) from error


def usable_cores() -> int:
    """Cores that this process may use: in a job of a cluster fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def die_with_parent() -> None:
    """End this worker when its parent is gone: by itself it would wait for work, or for room for its results, forever.

    In a process that is nobody's worker this does nothing.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
