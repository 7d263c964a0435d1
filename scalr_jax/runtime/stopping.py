"""SIGTERM and Ctrl-C, heard from the start of a run to its end.

While steps are made a request is only noted: the loop saves and stops. Elsewhere there is nothing to save, and the run
ends by an exception; where the main thread is in a compiler or a system call, by itself after `PATIENCE` seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

PATIENCE = 8.0  # seconds; clusters kill 15 to 30 s after SIGTERM
AGAIN = "the same command goes on from the last checkpoint, or begins again where there is none"
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(BaseException):
    """The run was asked to stop, and has saved what there was to save; its sentence says how to go on.

    No `Exception`, so that nothing that handles errors takes it for one.
    """


class Requests:
    """Requests to stop that this process got, and whether it can save now."""

    def __init__(self):
        self.asked = False
        self.saving = False  # steps are made: whoever makes them saves and stops
        self.tell: Callable[[], object] | None = None  # says it to the other processes
        self._closed = False

    def hear(self, number: int, _: object = None) -> None:
        """Python's handler: runs in the main thread, between two of its operations."""
        again, self.asked = self.asked, True
        if again:
            return  # `_listen` sees to a second Ctrl-C
        if self.tell is not None:
            self.tell()
        if self.saving:
            if number == signal.SIGINT:
                _write(1, "stopping after this step, to save; Ctrl-C again leaves at once")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        elif self.tell is None:
            raise Preempted(f"stopped as asked; {AGAIN}")

    def listen(self, pipe: int) -> None:
        """A thread's work: it gets the number of each signal at once, whatever the main thread does."""
        interrupts = 0
        while number := os.read(pipe, 1):
            interrupts += number[0] == signal.SIGINT
            if interrupts > 1:
                leave(2, f"scalr_jax: error: interrupted twice; {AGAIN}")
            if number[0] == signal.SIGTERM:
                timer = threading.Timer(PATIENCE, self._leave_unless_saving)
                timer.daemon = True
                timer.start()
        os.close(pipe)

    def close(self) -> None:
        self._closed = True

    def _leave_unless_saving(self) -> None:
        if not self.saving and not self._closed:
            leave(0, f"stopped as asked; {AGAIN}")


_requests: Requests | None = None


def requests() -> Requests | None:
    """Those of the `heard` that this is in, if any."""
    return _requests


def check() -> None:
    """Raises `Preempted` when a request came while the last state was saved."""
    if _requests is not None and _requests.asked and _requests.tell is None:
        raise Preempted(f"stopped as asked; {AGAIN}")


@contextlib.contextmanager
def heard() -> Iterator[Requests]:
    """Hears both signals in this block, in the main thread; another thread's block hears nothing. Blocks may nest."""
    global _requests
    if _requests is not None or threading.current_thread() is not threading.main_thread():
        yield _requests or Requests()
        return
    mine = _requests = Requests()
    ours, pythons = os.pipe()
    os.set_blocking(pythons, False)
    threading.Thread(target=mine.listen, args=(ours,), daemon=True).start()
    pipe_before = signal.set_wakeup_fd(pythons, warn_on_full_buffer=False)
    before = {number: signal.signal(number, mine.hear) for number in SIGNALS}
    try:
        yield mine
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not Python's
        signal.set_wakeup_fd(pipe_before)
        os.close(pythons)  # ends the thread
        mine.close()
        _requests = None


def leave(code: int, sentence: str) -> NoReturn:
    """Says the sentence and ends the process, without waiting for anything."""
    _write(2 if code else 1, sentence)
    os._exit(code)


def _write(file: int, sentence: str) -> None:
    """Not by `print`, which a handler or another thread may find in use."""
    with contextlib.suppress(OSError):
        os.write(file, f"{sentence}\n".encode())
