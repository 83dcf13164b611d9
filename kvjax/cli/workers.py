"""Processes of one run: their lines as they come, and the end of all when one dies."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from kvjax.core.errors import InputError

GRACE = 3.0  # s between asking a process to end and ending it
_NOISE = re.compile(r"\s*(@ |\*\*\* |\[Gloo\] |$)")  # stack traces of C++, greetings, empty lines


class Worker:
    """One process, whose output is passed on line by line."""

    def __init__(self, number: int, words: Sequence[str], environment: Mapping[str, str]):
        self.number, self.last = number, ""
        self.unread: Exception | None = None  # why its lines could not be passed on
        try:
            self.process = subprocess.Popen(
                words,
                env=os.environ | environment | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # so that what it starts can be ended with it
            )
        except OSError as error:
            raise InputError(
                "command",
                got=f"{words[0]} ({error.strerror})",
                expected="a program that can be run",
                fix="check its name",
            ) from None
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            try:  # in one piece, or lines of others would come into it
                print(f"[{self.number}] {line.rstrip()}\n", end="", flush=True)
            except (OSError, ValueError) as error:  # it would wait for a reader, and never end
                self.unread = error
                self.signal(signal.SIGKILL)
                return
            if not _NOISE.match(line):
                self.last = line.strip()

    def signal(self, number: int) -> None:
        """To the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def run_all(words: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
    """Runs `words` once per environment until all have ended well.

    Raises:
      InputError: one that ended otherwise: which, how, its last line. The others are ended.
      OSError, ValueError: lines that this process could not write. All are ended.
    """
    ended: queue.Queue[Worker] = queue.Queue()

    def wait(worker: Worker) -> None:
        worker.process.wait()
        ended.put(worker)

    workers: list[Worker] = []
    with _terminable():
        try:
            for number, own in enumerate(environments):
                workers.append(Worker(number, words, own))
                threading.Thread(target=wait, args=(workers[-1],), daemon=True).start()
            for _ in workers:
                worker = ended.get()
                if worker.unread is not None:
                    raise worker.unread
                if worker.process.returncode:
                    worker = _cause(worker, ended)
                    worker.reader.join(1.0)
                    raise _died(worker, len(workers))
        finally:
            _end(workers)
    for worker in workers:
        worker.reader.join(10.0)


def _cause(first: Worker, ended: queue.Queue[Worker]) -> Worker:
    """Which death was not another's: a signal from outside, or else what came first.

    Those who wait for a dead process raise or abort within milliseconds, and may be seen first.
    """
    time.sleep(0.2)
    dead = [first]
    with contextlib.suppress(queue.Empty):
        while True:
            dead.append(ended.get_nowait())
    status = lambda worker: worker.process.returncode
    return next((w for w in dead if status(w) < 0 and status(w) != -signal.SIGABRT), first)


def _died(worker: Worker, count: int) -> InputError:
    status = worker.process.returncode
    names = {int(known): known.name for known in signal.Signals}
    how = f"exit code {status}" + (f" ({names.get(-status, 'a signal')})" if status < 0 else "")
    line = f"and the last line {worker.last!r}" if worker.last else "and no line"
    others = "the others have been ended; " if count > 1 else ""
    return InputError(
        f"process {worker.number} of {count}",
        got=f"{how} {line}",
        expected="exit code 0",
        fix=f"{others}see its lines above",
    )


def _end(workers: Sequence[Worker]) -> None:
    """Ends what still runs: asked first, after `GRACE` seconds not."""
    running = [worker for worker in workers if worker.process.poll() is None]
    for worker in running:
        worker.signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for worker in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(0.0, deadline - time.monotonic()))
    for worker in workers:  # also what a process has left behind
        worker.signal(signal.SIGKILL)
    for worker in running:
        worker.process.wait()


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP leave by an exception, so that no process stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    leave = lambda number, frame: sys.exit(128 + number)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {n: known for n, known in before.items() if known is not signal.SIG_IGN}  # nohup
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)
