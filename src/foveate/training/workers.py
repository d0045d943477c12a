"""Runs in processes of their own, a thread each, so that models are trained side by side."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from foveate.core.errors import FoveateError
from foveate.training.run import Run

__all__ = ["Told", "side_by_side"]

Told = Callable[[Run, int, float], None]
Work = Callable[[Run, Path | None, Callable[[int, float], None] | None], dict[str, Any]]
PAUSE = 0.2
"""Seconds between two looks at a process, and between two reports of one."""


def side_by_side(
    work: Work, runs: Sequence[tuple[Run, Path | None]], workers: int, tell: Told | None
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Each run with what came of it, as they end.

    Args:
        work: What is done with a run; a function of a module, for the processes must find it.
        runs: The runs, each with its folder.
        workers: Number of processes.
        tell: Called now and then with a run, its step and its loss.

    Raises:
        FoveateError: a process has died.
    """
    context = multiprocessing.get_context("spawn")
    tasks, found = context.Queue(), context.Queue()
    for n, (run, folder) in enumerate(runs):
        tasks.put((n, run, folder))
    crew = [context.Process(target=labour, args=(work, tasks, found), daemon=True) for _ in range(workers)]
    try:
        for process in crew:
            process.start()
        left = len(runs)
        while left:
            try:
                n, kind, what = found.get(timeout=PAUSE)
            except queue.Empty:
                died = [p.exitcode for p in crew if p.exitcode]
                if died:
                    raise FoveateError(
                        f"a process that trained a model died (exit code {died[0]}), of too little memory perhaps; "
                        "what the others have trained is kept"
                    ) from None
                continue
            run = runs[n][0]
            if kind == "error":
                raise what
            if kind == "step" and tell is not None:
                tell(run, *what)
            if kind == "done":
                left -= 1
                yield run, what
    finally:
        # what nobody will fetch any more must not be waited for when Python ends
        tasks.cancel_join_thread()
        for process in crew:
            process.terminate()
        for process in crew:
            process.join()


def labour(work: Work, tasks: Any, found: Any) -> None:
    """What a process does: one run after another, until it is ended from outside."""
    # the parent is interrupted too, and ends this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        n, run, folder = tasks.get()
        try:
            found.put((n, "done", work(run, folder, reporter(n, found))))
        except Exception as e:
            found.put((n, "error", e))


def reporter(n: int, found: Any) -> Callable[[int, float], None]:
    """Reports steps, not more often than a person can read."""
    last = 0.0

    def tell(step: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > PAUSE:
            last = now
            found.put((n, "step", (step, loss)))

    return tell
