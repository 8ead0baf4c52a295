"""SIGTERM and Ctrl-C: finish the step, save, leave."""

import signal

# sysexits.h calls 75 a temporary failure; schedulers requeue on it.
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class Stopped(Exception):
    """Raised inside a long evaluation when the run was asked to stop."""


class StopSignal:
    """Remembers that the process was asked to stop; a second Ctrl-C stops at once."""

    def __init__(self):
        self.received: signal.Signals | None = None
        self.error: Exception | None = None
        self._before = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *unused) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        del frame
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def fail(self, error: Exception) -> None:
        """Asks to stop because of an error, which ``poll`` raises."""
        self.error = error

    def poll(self) -> None:
        """Raises ``Stopped`` when asked to stop, or the error that asks for it."""
        if self.received is not None:  # First: who stops a job signals its data workers too.
            raise Stopped
        if self.error is not None:
            raise self.error

    @property
    def exit_status(self) -> int:
        """What the process ends with after saving."""
        return EXIT_INTERRUPTED if self.received == signal.SIGINT else EXIT_PREEMPTED
