"""What a run's network is like inside, kept in its work directory: ``analysis.json``."""

from collections.abc import Collection
from functools import partial
from typing import Any

import jax
import numpy as np
import tqdm

from resnet_jax.buckets import Folder
from resnet_jax.classification import probes
from resnet_jax.classification.steps import make_eval_step
from resnet_jax.classification.task import Classification
from resnet_jax.models.resnet import ResNet
from resnet_jax.output import write_json
from resnet_jax.paper.runs import ANALYSIS
from resnet_jax.run import open_run
from resnet_jax.training.checkpoints import latest_step
from resnet_jax.training.state import TrainState
from resnet_jax.training.workdir import read_json

KINDS = ("responses", "removal", "landscape")
_DIRECTIONS, _REACH, _POINTS = 3, 1.0, 21  # Lines, how far they go in lengths of the weights, and points on each.


def analyse(folder: Folder, kinds: Collection[str], examples: int) -> None:
    """Computes what is asked for and not known yet of the run as it is.

    Args:
      folder: a work directory.
      kinds: of ``KINDS``.
      examples: how many test images ``removal`` and ``landscape`` look at, drawn at random; ``responses`` take all.
    """
    known, step = read_json(folder / ANALYSIS) or {}, latest_step(folder) or 0
    of_this = {kind: {"step": step} | ({} if kind == "responses" else {"asked": examples}) for kind in kinds}
    wanted = [kind for kind in kinds if not of_this[kind].items() <= known.get(kind, {}).items()]
    if not wanted:
        return
    with open_run(folder) as (task, state):
        if not isinstance(task.model, ResNet):
            print(f"{folder}: {task.name} has no residual or plain blocks to look at", flush=True)
            return
        model, state = task.per_block(state)
        chosen = np.sort(np.random.default_rng(0).permutation(task.test_examples)[:examples]).astype(np.int32)
        probe = {"responses": _responses, "removal": _removal, "landscape": _landscape}
        for kind in wanted:
            print(f"{folder}: {kind}", flush=True)
            known[kind] = of_this[kind] | probe[kind](task, model, state, chosen)
            write_json(folder / ANALYSIS, known)


def _responses(task: Classification, model: ResNet, state: TrainState, chosen: np.ndarray) -> dict[str, Any]:
    del chosen
    step = jax.jit(probes.make_response_step(model))
    found = task.look(task.single_view(step, "test"), "test", state)
    layers = probes.response_layers(model, state.variables, task.image_shape)
    return {"layers": list(layers), "deviations": probes.response_deviations(found).tolist()}


def _removal(task: Classification, model: ResNet, state: TrainState, chosen: np.ndarray) -> dict[str, Any]:
    step, blocks = jax.jit(probes.make_removal_step(model)), probes.block_names(model)

    def error(removed: np.ndarray) -> float:
        one = task.single_view(partial(step, removed=removed), "test", chosen)
        return 100 * float(np.mean(task.look(one, "test", state)["rank"] >= 1))

    whole = error(np.zeros(len(blocks), bool))
    each = [
        error(removed) for removed in tqdm.tqdm(np.eye(len(blocks), dtype=bool), "blocks", disable=None, leave=False)
    ]
    return {"blocks": list(blocks), "whole": whole, "top1_errors": each, "examples": len(chosen)}


def _landscape(task: Classification, model: ResNet, state: TrainState, chosen: np.ndarray) -> dict[str, Any]:
    one = task.single_view(jax.jit(make_eval_step(model)), "test", chosen)
    variables = jax.device_get(state.variables)
    distances, losses = np.linspace(-_REACH, _REACH, _POINTS), []
    for seed in range(_DIRECTIONS):
        direction = probes.random_direction(variables["params"], seed)
        line = []
        for distance in tqdm.tqdm(distances, f"direction {seed + 1}", disable=None, leave=False):
            params = jax.tree.map(partial(_moved, distance), variables["params"], direction)
            moved = state.replace(params=params, batch_stats=variables["batch_stats"], average=None)
            line.append(float(np.mean(task.look(one, "test", moved)["loss"], dtype=np.float64)))
        losses.append(line)
    return {"distances": distances.tolist(), "losses": losses, "examples": len(chosen)}


def _moved(distance: float, weights: np.ndarray, direction: np.ndarray) -> np.ndarray:
    return (weights + distance * direction).astype(weights.dtype)
