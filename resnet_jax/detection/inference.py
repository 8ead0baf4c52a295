"""Finding objects: proposals, their regions, detections; with appendix B's refinement, several scales and ensembles.

A detector alone at one scale is the case of one member and no views.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from resnet_jax.data import augment
from resnet_jax.detection.boxes import at_least_float32, sides
from resnet_jax.detection.detections import Predictions, best_boxes, detect, predict
from resnet_jax.detection.faster_rcnn import FasterRCNN, Levels
from resnet_jax.detection.per_image import for_each_image
from resnet_jax.detection.proposals import Proposals, propose
from resnet_jax.detection.settings import Settings

Batch = dict[str, jax.Array]
# Mean and std of the pixels, [3] each.
Resident = dict[str, jax.Array]


class View(NamedTuple):
    """Images [n, H, W, 3] at one scale, as a network takes them, and their own sizes on the canvas, int [n, 2]."""

    images: jax.Array
    extent: jax.Array


class Maps(NamedTuple):
    """The features of a view: see ``FasterRCNN.features``; and the view's ``extent``."""

    levels: Levels
    level_extents: Levels
    extent: jax.Array


class Member(NamedTuple):
    """A detector with its variables."""

    model: FasterRCNN
    variables: dict[str, Any]

    def call(self, method: str | Callable[..., Any], *arguments: Any) -> Any:
        """What a method of the network, or a function of it, gives."""
        return self.model.apply(self.variables, *arguments, method=method)

    def maps(self, view: View) -> Maps:
        """The features of a view."""
        return Maps(*self.call("features", *view), view.extent)


def proposals_of(member: Member, maps: Maps, settings: Settings) -> Proposals:
    """A member's proposals in each image, [n, P, ...]."""
    shapes = [features.shape[1:3] for features in maps.levels]

    def propose_in(logits, codes, level_extents, extent) -> Proposals:
        counts = settings.test_before_nms, settings.test_after_nms
        return propose(logits, codes, member.model.grids(shapes, level_extents), extent, *counts, settings)

    return for_each_image(propose_in)(*member.call("propose", maps.levels), maps.level_extents, maps.extent)


def union(proposals: Sequence[Proposals]) -> Proposals:
    """All members' proposals (appendix B), one after the other: [n, P, ...] each -> [n, members P, ...]."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *proposals)


def lower_view(regions: jax.Array, extent: jax.Array, views: Sequence[jax.Array], best_side: float) -> jax.Array:
    """In which two views, this one and the next, each region is looked at: int32 [n, R].

    Those between which its side (the root of its area) would be of ``best_side`` pixels, or the two at the end.

    Args:
      regions: [n, R, 4], pixels of what ``extent`` is of.
      extent: the images' sizes there, int [n, 2].
      views: the same of each view, int [n, 2], rising.
      best_side: ``detection.test_side``.
    """
    width, height = sides(regions)
    side = jnp.sqrt(jnp.maximum(width * height, 0))
    area = jnp.prod(extent.astype(jnp.float32), axis=-1)
    scales = jnp.stack([jnp.sqrt(jnp.prod(view.astype(jnp.float32), axis=-1) / area) for view in views])
    small = (side * scales[1:, :, None] < best_side).sum(0, dtype=jnp.int32)
    return jnp.minimum(small, len(views) - 2)


def region_features(
    member: Member, regions: jax.Array, base: Maps, views: Sequence[Maps], best_side: float
) -> jax.Array:
    """What the head looks at, [n, R, D]; of several views the elementwise maximum over two adjacent ones.

    As of the paper's appendix B: RoI pooling and the layers that follow on the maps of two scales, merged by maxout.

    Args:
      member: whose.
      regions: [n, R, 4], pixels of the base.
      base: the maps at the usual scale.
      views: those at others, by rising scale; none: the base's alone.
      best_side: as of ``lower_view``.
    """
    if not views:
        return member.call("region_features", member.call("pool", *base[:2], regions, base.extent))
    whole = jnp.concatenate([jnp.zeros_like(base.extent), base.extent[:, ::-1]], axis=1)[:, None]
    pooled_regions = (
        jnp.concatenate([regions, whole.astype(regions.dtype)], axis=1) if member.model.context else regions
    )
    lower = lower_view(pooled_regions, base.extent, [view.extent for view in views], best_side)
    lower = lower[..., None, None, None]
    of_lower = of_upper = 0
    for number, view in enumerate(views):
        down, across = jnp.moveaxis(view.extent / base.extent, -1, 0)
        there = regions * jnp.stack([across, down, across, down], axis=-1)[:, None]
        pooled = member.call("pool", *view[:2], there, view.extent)
        of_lower = jnp.where(lower == number, pooled, of_lower)
        of_upper = jnp.where(lower + 1 == number, pooled, of_upper)
    return jnp.maximum(member.call("region_features", of_lower), member.call("region_features", of_upper))


def _head(network: FasterRCNN, features: jax.Array) -> tuple[jax.Array, jax.Array]:
    return network.head(features)


def infer(members: Sequence[Member], base: Sequence[View], views: Sequence[Sequence[View]], settings: Settings):
    """The members' mean predictions at all their proposals, before suppression.

    Args:
      members: the detectors, of the same classes.
      base: for each member the images at the usual scale, normalised its way.
      views: for each member the images at other scales, rising; or none.
      settings: how many proposals, P; and with ``refine`` their best boxes once more: twice as many regions.

    Returns:
      ``Predictions`` [n, members P, classes, ...], or with ``refine`` twice as many.
    """
    maps = [member.maps(view) for member, view in zip(members, base, strict=True)]
    seen = [[member.maps(view) for view in more] for member, more in zip(members, views, strict=True)]
    proposals = union([proposals_of(*pair, settings) for pair in zip(members, maps, strict=True)])
    extent = base[0].extent

    def predict_at(regions: jax.Array) -> Predictions:
        said = []
        for member, own, more in zip(members, maps, seen, strict=True):
            logits, codes = member.call(_head, region_features(member, regions, own, more, settings.test_side))
            decoded = jax.vmap(functools.partial(predict, settings=settings))
            said.append(decoded(logits, codes, regions, proposals.valid, extent))
        return jax.tree.map(lambda *parts: sum(parts) / len(parts), *said)

    predictions = predict_at(proposals.boxes)
    if not settings.refine:
        return predictions
    again = predict_at(jax.vmap(best_boxes)(predictions))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), predictions, again)


def inputs(batch: Batch) -> Batch:
    """What inference looks at of a batch of ``batches.evaluation_batches``: images, also of views, extents, scale."""
    return {name: array for name, array in batch.items() if name.partition("_")[0] in ("images", "extent", "scale")}


def make_inference_step(
    models: Sequence[FasterRCNN], settings: Settings, views: Sequence[int] = ()
) -> Callable[[Sequence[dict[str, Any]], Batch, Sequence[Resident]], dict[str, jax.Array]]:
    """Builds ``step(variables, batch, residents)``: the objects found in each image, by falling score.

    Args:
      models: one, or an ensemble's members, each with its variables and its pixels' mean and std.
      settings: Faster R-CNN's numbers.
      views: shorter sides at which regions are looked at; none: at the usual scale.

    Returns:
      The step; of a batch it takes ``inputs``. Returned are ``boxes`` [n, D, 4] in the image's own pixels, ``scores``
      [n, D], ``labels`` int32 [n, D], classes from 0, and ``valid`` bool [n, D], False (and all else 0) after the last
      one; D is ``settings.detections``.
    """

    def step(variables: Sequence[dict[str, Any]], batch: Batch, residents: Sequence[Resident]) -> dict[str, jax.Array]:
        def view(resident: Resident, ending: str = "") -> View:
            images = augment.normalise(batch[f"images{ending}"], resident["mean"], resident["std"])
            return View(images, batch[f"extent{ending}"])

        members = [Member(*pair) for pair in zip(models, variables, strict=True)]
        base = [view(resident) for resident in residents]
        others = [[view(resident, f"_{side}") for side in views] for resident in residents]
        predictions = infer(members, base, others, settings)
        found = for_each_image(lambda *of_image: detect(Predictions(*of_image), settings))(*predictions)
        down, across = jnp.moveaxis(at_least_float32(batch["scale"]), -1, 0)
        scale = jnp.stack([across, down, across, down], axis=-1)[:, None]
        return {"boxes": found.boxes / scale, "scores": found.scores, "labels": found.labels, "valid": found.valid}

    return step
