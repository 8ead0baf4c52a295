"""SIGTERM, Ctrl-C and a cluster's notice of preemption: finish the step, save, leave, all processes at once."""

import os
import signal
import socket
import threading

from jax.experimental import multihost_utils

from resnet_jax import peers

# sysexits.h calls 75 a temporary failure; schedulers requeue on it.
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class Stopped(Exception):
    """Raised inside a long evaluation when the run was asked to stop."""


class StopSignal:
    """Remembers that the process, or another of the same run, was asked to stop; a second Ctrl-C stops at once.

    Until ``unsaved`` is set there is nothing to lose: then being asked ends the process at once, also in the midst of a
    compilation, where Python's own handlers would wait for its end.

    In a run of several processes JAX's coordination service takes SIGTERM and what else tells of preemption, and has
    all processes stop at the same call of ``asked``: each must call it as often as the others.
    """

    _calls = 0  # Of ``asked``, in all runs of this process: the coordination service knows just one count.

    def __init__(self):
        self.received: signal.Signals | None = None
        self.error: Exception | None = None
        self._unsaved, self._asked, self._closed = False, False, False
        self._leaving = threading.Lock()  # Who leaves at once holds it to the end: nothing goes on beside.
        self._before = {}

    def __enter__(self) -> "StopSignal":
        # SIGTERM is the coordination service's where there is one.
        numbers = (signal.SIGINT,) if peers.peers() else (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            self._before[number] = signal.signal(number, self._handle)
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._waker = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch_signals, name="signals", daemon=True).start()
        if peers.peers():
            self._notices = threading.Thread(target=self._watch_notices, name="notices", daemon=True)
            self._notices.start()
        return self

    def __exit__(self, *unused) -> None:
        with self._leaving:
            self._closed = True
        if peers.peers():
            self._notices.join()
        signal.set_wakeup_fd(self._waker)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._writer.close()  # Which ends the thread that reads.

    @property
    def unsaved(self) -> bool:
        """Whether steps were made since the start."""
        return self._unsaved

    @unsaved.setter
    def unsaved(self, value: bool) -> None:
        with self._leaving:
            self._unsaved = value

    def _handle(self, number: int, frame) -> None:
        del frame
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if peers.peers():
            os.kill(os.getpid(), signal.SIGTERM)  # Tells the other processes.

    def _watch_signals(self) -> None:
        """Python writes the number of each signal here as it comes, whatever the main thread is doing."""
        with self._reader:
            while number := self._reader.recv(1):
                if number[0] in self._before:
                    self._leave_if_nothing_is_lost(signal.Signals(number[0]))

    def _watch_notices(self) -> None:
        while not self._closed and not self.unsaved:
            if peers.peers().wait_for_preemption(1.0):
                return self._leave_if_nothing_is_lost(None)

    def _leave_if_nothing_is_lost(self, received: signal.Signals | None) -> None:
        self._leaving.acquire()
        if self._unsaved or self._closed:
            self._leaving.release()
            return
        status = EXIT_INTERRUPTED if signal.SIGINT in (received, self.received) else EXIT_PREEMPTED
        by = received.name if received else "a notice of preemption"
        message = f"stopped by {by}; nothing was lost"
        if peers.peers():  # Those that were faster may have made a step, but can't end a second one without this.
            peers.peers().dismiss(status, message)
        peers.end(status, message)

    def fail(self, error: Exception) -> None:
        """Asks to stop because of an error, which ``poll`` raises."""
        self.error = error

    def asked(self) -> bool:
        """Whether to stop now; every process has the same answer at the same call."""
        if peers.peers() and not self._asked:
            if not self._unsaved:  # ``_watch_notices`` sees to it. JAX's call would hold up all threads if one is gone.
                return False
            StopSignal._calls += 1
            self._asked = multihost_utils.reached_preemption_sync_point(StopSignal._calls)
            return self._asked
        return self._asked or self.received is not None

    def poll(self) -> None:
        """Raises ``Stopped`` when asked to stop, or the error that asks for it."""
        if self.error is not None and peers.peers():  # This process has not come where the others ask next.
            raise self.error
        if self.asked():  # First: who stops a job signals its data workers too.
            raise Stopped
        if self.error is not None:
            raise self.error

    @property
    def reason(self) -> str:
        """By what the run is stopped."""
        return self.received.name if self.received else "a notice of preemption"

    @property
    def exit_status(self) -> int:
        """What the process ends with after saving."""
        return EXIT_INTERRUPTED if self.received == signal.SIGINT else EXIT_PREEMPTED
