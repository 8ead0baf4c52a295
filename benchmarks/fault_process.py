"""What faults.py starts: resnet_jax.main with a tiny network, which says what it does and sends a signal at a moment.

    python benchmarks/fault_process.py PLAN --config=... --workdir=... [--coordinator=...]

PLAN is JSON: ``events``, a folder; ``process``, this one's number; ``fault``, null or the ``signal``, the ``phase``
that it is to come in, how many steps ``after`` those that the run goes on from, the ``delay`` into that phase in
seconds, and to which processes it goes (``to``). Each process appends to ``events/N.jsonl`` what happened and when
(``time.monotonic()``, the same for all processes of a machine).
"""

from collections.abc import Callable
import faulthandler
import functools
import json
import os
import pathlib
import runpy
import signal
import sys
import threading
import time
from typing import Any


class Phases:
    """What this process is doing; sends the signal when that is what the plan says."""

    def __init__(self, events: str, process: int, fault: dict[str, Any] | None):
        self._folder, self._fault = pathlib.Path(events), fault
        self._now: dict[str, int] = {}  # The phases that this process is in; each time has a number.
        self._count, self._lock = 0, threading.RLock()
        self._first, self._step = 0, 0
        (self._folder / f"{process}.pid").write_text(str(os.getpid()))
        self._log = os.open(self._folder / f"{process}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(self, what: str, **values: Any) -> None:
        """Appends an event; nothing of it is in this process's memory afterwards, which may be the last it does."""
        os.write(self._log, f"{json.dumps({'at': time.monotonic(), 'what': what, **values})}\n".encode())

    def resumed(self, step: int) -> None:
        """The run goes on from ``step``."""
        self._first = self._step = step
        self.tell("resumed", step=step)

    def stepped(self, step: int) -> None:
        """A step has been given to the devices."""
        if self._step == self._first:
            self.tell("first step")
        self._step = step
        self.leave("starting")

    def enter(self, phase: str) -> None:
        """A phase begins; the one that starts may be said to begin twice."""
        with self._lock:
            if phase == "starting" and (self._now or self._step != self._first):
                return
            self._count += 1
            self._now[phase] = self._count
            fault = self._fault
            if fault and phase == fault["phase"] and self._step >= self._first + fault["after"]:
                arguments = (phase, self._count, fault["delay"])
                threading.Thread(target=self._strike, args=arguments, daemon=True).start()

    def leave(self, phase: str) -> None:
        """A phase ends."""
        with self._lock:
            self._now.pop(phase, None)

    def _strike(self, phase: str, count: int, delay: float) -> None:
        """Sends the signal if the delay ends within the phase; else the next time, with a shorter one."""
        time.sleep(delay)
        with self._lock:
            if not self._fault:
                return
            if self._now.get(phase) != count and phase != "starting":  # A process starts just once.
                self._fault["delay"] = delay / 2
                return
            fault, self._fault = self._fault, None
            pids = [int((self._folder / f"{process}.pid").read_text()) for process in fault["to"]]
            struck = phase if self._now.get(phase) == count else "training"
            self.tell("fault", phase=struck, step=self._step)
            for pid in sorted(pids, key=lambda pid: pid == os.getpid()):
                os.kill(pid, signal.Signals[fault["signal"]])


def around(owner: type, name: str, before: Callable[..., None], after: Callable[..., None] | None = None) -> None:
    """Calls ``before`` (with the arguments) and ``after`` (with the result) around a method."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def hooked(self, *args, **kwargs):
        before(*args, **kwargs)
        result = None
        try:
            result = original(self, *args, **kwargs)
            return result
        finally:
            if after:
                after(result)

    setattr(owner, name, hooked)


def main() -> None:
    """Hooks into the places where phases begin and end, and runs the program."""
    phases = Phases(**json.loads(sys.argv.pop(1)))
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # Asked for by who has waited too long.

    from resnet_jax import peers
    from resnet_jax.classification.task import Classification
    from resnet_jax.models.registry import MODELS
    from resnet_jax.models.resnet import ResNet
    from resnet_jax.training.checkpoints import Checkpoints
    from resnet_jax.training.dispatch import Dispatch
    from resnet_jax.training.metrics import Console
    from resnet_jax.training.run import Run
    from resnet_jax.training.signals import StopSignal

    MODELS["tiny"] = functools.partial(ResNet, blocks=(1,), widths=(4,), shortcut="A", stem="cifar", stem_width=4)

    def nothing(*unused: Any) -> None:
        """For hooks that look at one end of a call alone."""

    # Who is alone takes SIGTERM from here on, and one of several as soon as it has joined the others.
    around(StopSignal, "__enter__", nothing, lambda _: phases.enter("starting"))
    join = peers.join

    def joined(seconds: float) -> None:
        phases.enter("starting")
        join(seconds)

    peers.join = joined
    around(Run, "_resume", nothing, lambda found: found and phases.resumed(found[1]))
    around(Dispatch, "advance", lambda *_: phases.enter("training"), lambda _: phases.leave("training"))
    around(Console, "advance", phases.stepped)
    around(Classification, "evaluate", lambda *_: phases.enter("evaluating"), lambda _: phases.leave("evaluating"))
    around(Checkpoints, "save", lambda *_: phases.enter("saving"))
    save, finish = Run.save, Checkpoints._finish

    def saving(self: Run) -> None:
        if self.step:
            phases.tell("save", step=self.step)
        save(self)

    def finishing(self: Checkpoints, response: Any, step: int, *rest: Any) -> None:
        try:
            finish(self, response, step, *rest)
            phases.tell("saved", step=step)
        finally:
            phases.leave("saving")

    Run.save, Checkpoints._finish = saving, finishing
    runpy.run_module("resnet_jax.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
