"""The other processes of a run: what they agree on, signs of life, and the verdict that ends all of them.

What the processes tell each other goes through the key-value store of JAX's coordination service, which runs in process
0; arrays go through the devices (``distributed.py``).
"""

from collections.abc import Mapping
import contextlib
import json
import os
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax

from resnet_jax import distributed
from resnet_jax.errors import UsageError

# sysexits.h calls 69 a service that is not available: another process of the run is lost.
EXIT_LOST = 69
_PATIENCE = 60  # Seconds after which process 0 says for whom it waits.
_STALL_SECONDS = 300  # When nothing moves for so long, process 0 says who is behind.
_BEAT = 1.0  # Seconds between two signs of life.
# What errors say where what processes do together was broken off, on CPUs, GPUs and TPUs.
_BROKEN_OFF = ("gloo", "nccl", "collective", "connection", "coordination", "unavailable", "barrier", "aborted")
_VERDICT, _LIFE, _AGREE, _TOLD = (f"resnet_jax/{name}" for name in ("verdict", "life/", "agree/", "told/"))


def say(line: str) -> None:
    """Prints to standard error, where there still is one: whoever has read it may be gone first."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def end(status: int, message: str) -> NoReturn:
    """Ends this process at once: others may be gone, and an orderly end would wait for them."""
    say(message)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status)


class Peers:
    """The processes of a run of several. Process 0 watches the others; JAX itself ends them should it be lost."""

    def __init__(self, seconds: float):
        """Begins to give signs of life; a process that gives none for ``seconds`` is lost."""
        from jax._src import distributed as service  # There is no public way to the store; Orbax takes this one too.

        self._client, self._seconds, self._closed = service.global_state.client, seconds, False
        self._who = f"process {jax.process_index()} ({socket.gethostname()})"
        self._step, self._doing, self._progress, self._agreements = 0, "starting", 0, 0
        works = (self._give_signs, self._wait_for_verdict)
        self._threads = [threading.Thread(target=work, name="peers", daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def at(self, step: int, doing: str) -> None:
        """Says where this process is; called often, in every process as often."""
        self._step, self._doing, self._progress = step, doing, self._progress + 1

    def agree(self, what: str, values: Mapping[str, Any]) -> None:
        """Checks that every process comes here with the same values (of JSON).

        Args:
          what: tells this check from others.
          values: by name, for the message.

        Waits for as long as the others are alive, and says for whom.

        Raises:
          UsageError: some process has others; it says which.
        """
        self._agreements += 1  # The key says nothing of the values: those that differ would wait for each other.
        key = f"{_AGREE}{what} {self._agreements}/"
        own = json.loads(json.dumps(values))
        self._client.key_value_set(f"{key}{jax.process_index()}", json.dumps([self._who, own]))
        if distributed.leads():
            found = ""
            for other in range(1, jax.process_count()):
                who, theirs = json.loads(self._wait_for(f"{key}{other}", f"process {other}"))
                differences = differing(theirs, own)
                found = found or (differences and f"{who} differs from {self._who}: {differences}")
            self._client.key_value_set(f"{key}found", found)
        found = self._wait_for(f"{key}found")
        if found:
            raise UsageError(found)

    def _wait_for(self, key: str, who: str = "") -> str:
        """What another process writes there, said to be waited for; should that one be lost, this one ends too."""
        while True:
            try:
                return self._client.blocking_key_value_get(key, 1000 * _PATIENCE)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                if who:
                    say(f"waiting for {who}, which is still starting")

    def fail(self, status: int, message: str) -> NoReturn:
        """Ends all processes with this status, for a reason that is this one's own."""
        self._judge(status, f"error: {self._who}: {message}")
        end(status, f"error: {message}")

    def dismiss(self, status: int, message: str) -> None:
        """Ends all the other processes with this status; the caller ends this one, at once."""
        self.close()
        self._judge(status, f"{self._who}: {message}")
        if not distributed.leads():  # JAX's own answer to a notice of preemption needs all processes for a moment.
            time.sleep(2 * _BEAT)

    def tell(self, what: str, text: str) -> None:
        """Leaves word for the other processes; the first word stays."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_TOLD}{what}", text)

    def told(self, what: str) -> str | None:
        """What a process has left word of; None if none has."""
        try:
            return self._client.key_value_try_get(f"{_TOLD}{what}")
        except jax.errors.JaxRuntimeError:
            return None

    def wait_for_verdict(self, error: Exception) -> None:
        """After an error that may come of another process's end: waits as long as it takes to find out."""
        if any(word in str(error).lower() for word in _BROKEN_OFF):
            time.sleep(self._seconds + 5 * _BEAT)

    def wait_for_preemption(self, seconds: float) -> bool:
        """Waits until any process of the run was told that it will be stopped; False where none was in that time."""
        try:
            # The key that JAX's coordination service announces it by; its own call answers between steps alone.
            self._client.blocking_key_value_get("RECEIVED_PREEMPTION_NOTICE", int(1000 * seconds))
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def close(self) -> None:
        """Nothing that happens to another process from now on matters."""
        self._closed = True

    def leave(self) -> None:
        """An orderly end, once all processes have come to it."""
        distributed.wait_for_all("leave")
        self.close()
        if distributed.leads():
            self._judge(0, "")  # Wakes who waits for a verdict.
        # JAX would wait longer for a process that is lost from here on, and crash then.
        timer = threading.Timer(self._seconds, end, (EXIT_LOST, "error: all is done, but a process did not end well"))
        timer.daemon = True
        timer.start()
        for thread in self._threads:
            thread.join()
        jax.distributed.shutdown()
        timer.cancel()

    def _judge(self, status: int, message: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # Another was first, or process 0 is gone.
            self._client.key_value_set(_VERDICT, json.dumps([status, jax.process_index(), message]))
        if status and distributed.leads():
            time.sleep(3 * _BEAT)  # The store goes with it.

    def _wait_for_verdict(self) -> None:
        while not self._closed:
            try:
                status, judge, message = json.loads(self._client.blocking_key_value_get(_VERDICT, 3_600_000))
            except jax.errors.JaxRuntimeError:
                time.sleep(_BEAT)
                continue
            # A status of 0 is the orderly end's; it may come before this process has noted that all are there.
            if status and judge != jax.process_index() and not self._closed:
                if distributed.leads():
                    time.sleep(_BEAT)
                end(status, message)
            return

    def _give_signs(self) -> None:
        beat, known, moved = 0, {}, ((), time.monotonic())
        while not self._closed:
            beat += 1
            life = {"beat": beat, "who": self._who, "step": self._step, "doing": self._doing}
            life["progress"] = self._progress
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # JAX tells, should it matter.
                self._client.key_value_set(f"{_LIFE}{jax.process_index()}", json.dumps(life), allow_overwrite=True)
                if distributed.leads():
                    lives = dict(self._client.key_value_dir_get(_LIFE))
                    self._look_for_lost(lives, known)
                    moved = warn_of_stall([json.loads(life) for life in lives.values()], *moved)
            time.sleep(_BEAT)

    def _look_for_lost(self, lives: dict[str, str], known: dict[str, tuple[str, float]]) -> None:
        now = time.monotonic()  # Of this machine's clock alone, and one that does not jump.
        for process in range(jax.process_count()):  # Also of those that were lost before their first sign of life.
            key = f"{_LIFE}{process}"
            life = lives.get(key, "")
            if key not in known or known[key][0] != life:
                known[key] = (life, now)
            elif now - known[key][1] > self._seconds and not self._closed:
                last = json.loads(life) if life else {"who": f"process {process}", "step": 0, "doing": "starting"}
                message = f"error: {last['who']} was lost at step {last['step']} ({last['doing']}):"
                message += f" silent for {self._seconds:.0f} s; the same command goes on from the last checkpoint"
                self._judge(EXIT_LOST, message)
                end(EXIT_LOST, message)


def differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first few values that differ, by name; empty where none do."""
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    shown = [f"{name} is {theirs.get(name)!r:.60}, not {ours.get(name)!r:.60}" for name in names[:3]]
    return "; ".join(shown) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def warn_of_stall(lives: list[dict[str, Any]], before: tuple[int, ...], since: float) -> tuple[tuple[int, ...], float]:
    """Says who is behind once nobody has moved for a while; returns everybody's progress, and since when it stands."""
    now, progress = time.monotonic(), tuple(life["progress"] for life in lives)
    if progress != before:
        return progress, now
    if now - since > _STALL_SECONDS:
        last = [life for life in lives if life["progress"] == min(progress)]
        them = ", ".join(f"{life['who']} at step {life['step']} ({life['doing']})" for life in last[:4])
        more = f" and {len(last) - 4} more" if len(last) > 4 else ""
        say(f"warning: nothing has moved for {now - since:.0f} s; furthest behind: {them}{more}")
        return progress, now
    return before, since


_peers: Peers | None = None


def join(seconds: float) -> None:
    """Called once, where there are several processes; see ``Peers``."""
    global _peers
    _peers = Peers(seconds)


def peers() -> Peers | None:
    """The processes of this run; None where there is just this one."""
    return _peers


def at(step: int, doing: str) -> None:
    """Tells the other processes, where there are any, where this one is; see ``Peers.at``."""
    if _peers:
        _peers.at(step, doing)
