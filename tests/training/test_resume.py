"""A run that is killed, stopped or broken off, and then started again, is the run that never was.

Every process here is a real one. It is killed by itself, from a hook at an exact place (a step, a save, an evaluation),
so that nothing depends on how fast the machine is.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import jax
from jax import numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from resnet_jax.config import load_config
from resnet_jax.run import run_classification
from resnet_jax.training.checkpoints import Checkpoints
from resnet_jax.training.metrics import MetricsWriter
from resnet_jax.training.schedules import initial_schedule_state
from resnet_jax.training.state import TrainState

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 60

# Everything a state can hold is in use: momentum, an average of the weights, plateau's memory, the best evaluation.
CONFIG = f"""
from resnet_jax.config import load_config

def get_config():
    config = load_config("digits_20")
    config.model.name = "cifar_resnet8"
    config.data.holdout = 200  # 1,238 images train: an epoch is 19 1/3 steps.
    config.epochs, config.steps = 0.0, {STEPS}
    config.optimizer.ema = 0.9
    config.schedule.name = "plateau"
    config.schedule.learning_rate = 0.05
    config.schedule.warmup_steps = 5
    config.schedule.patience = 1
    config.eval.every = 20
    config.eval.batch_size = 50
    config.checkpoint.every = 8
    config.log.every = 5
    return config
"""

# Runs `resnet_jax.main` and sends a signal to itself: python -c HOOK SIGNAL PLACE STEP FLAGS...
HOOK = """
import os, pathlib, runpy, signal, sys, threading, time

number, place, at = signal.Signals[sys.argv[1]], sys.argv[2], int(sys.argv[3])
sys.argv[1:4] = []

from resnet_jax.classification.task import Classification
from resnet_jax.training.checkpoints import Checkpoints
from resnet_jax.training.metrics import Console
from resnet_jax.training import loop

sent = []

def send():
    if not sent:
        sent.append(True)
        os.kill(os.getpid(), number)

def before(owner, name, action):
    original = getattr(owner, name)
    def hooked(self, *args, **kwargs):
        action(self, *args, **kwargs)
        return original(self, *args, **kwargs)
    setattr(owner, name, hooked)

def at_step(console, step):
    if step == at:
        send()

def in_save(checkpoints, state, step, *rest):
    # Later, when the background write has begun: its folder has a temporary name until it is whole.
    def watch():
        folder = checkpoints._checkpointer.directory
        while not any("tmp" in path.name for path in pathlib.Path(folder).glob("*")):
            pass
        send()
    if step >= at:
        threading.Thread(target=watch, daemon=True).start()

def before_save(checkpoints, state, step, *rest):
    if step >= at:
        send()

def in_evaluation(task, state, split, poll):
    task.polls = 0

def after_some_batches(task, state, split, poll):
    polls = []
    def counting():
        polls.append(True)
        if int(state.step) >= at and len(polls) == 3:
            send()
        poll()
    return evaluate(task, state, split, counting)

if place == "step":
    before(Console, "advance", at_step)
elif place == "save":
    before(Checkpoints, "save", in_save)
elif place == "before-save":
    before(Checkpoints, "save", before_save)
elif place == "report":
    before(loop.Training, "_report", lambda *_: send())
elif place == "evaluation":
    evaluate = Classification.evaluate
    Classification.evaluate = after_some_batches

runpy.run_module("resnet_jax.main", run_name="__main__", alter_sys=True)
"""
