"""From a config to a run: devices, task, work directory, loop."""

from collections.abc import Collection
import pathlib

import jax
import ml_collections

from resnet_jax import distributed
from resnet_jax.classification.task import Classification
from resnet_jax.config import flatten
from resnet_jax.errors import UsageError
from resnet_jax.locks import lock
from resnet_jax.pretrained.source import resumed
from resnet_jax.pretrained.start import starting_weights
from resnet_jax.training.checkpoints import latest_step
from resnet_jax.training.loop import Training
from resnet_jax.training.workdir import check_data, check_recipe, check_writable, open_workdir


def run_classification(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, mode: str, explicit: Collection[str] = ()
) -> int:
    """Trains (``train``) or evaluates (``eval``) in ``workdir``; returns the exit status.

    Args:
      config: the whole config.
      workdir: the work directory.
      mode: ``train`` or ``eval``.
      explicit: names of the fields that the command line has set; weights don't change them.

    Raises:
      UsageError: before anything is written, where config, data, devices and work directory don't fit.
    """
    workdir = workdir.absolute()
    check_recipe(workdir, flatten(config), training=mode == "train")
    check_writable(workdir)
    done = latest_step(workdir)
    if mode == "eval" and done is None and not config.init.weights:
        raise UsageError(f"--mode=eval: {workdir} has no checkpoint; train it first, or set --config.init.weights")
    if config.model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    mesh = distributed.make_mesh()
    with jax.set_mesh(mesh):
        start = starting_weights(config) if done is None else resumed(workdir)
        task = Classification(config, mesh, start, explicit)
        train = mode == "train"
        if done is not None:
            check_data(workdir, task.description, training=train)
        if train and (done or 0) > task.total_steps:
            raise UsageError(f"--workdir={workdir} is at step {done} already, beyond the {task.total_steps} asked for")
        if not train and done is not None:  # Another command's settings are not the run's.
            return Training(task, config, workdir, mesh, write=False).evaluate_only()
        open_workdir(workdir, flatten(config), task.description)
        with lock(workdir / ".lock", f"--workdir={workdir}: another process is training there"):
            training = Training(task, config, workdir, mesh)
            return training.run() if train else training.evaluate_only()
