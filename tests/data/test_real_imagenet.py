"""The input pipeline on a hundred real ImageNet photos: against Pillow and NumPy, and trained from."""

import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from resnet_jax.data.crops import CenterCrop, ScaleCrop, example_uniforms
from resnet_jax.data.decode import decode, resized_shape

ROOT = pathlib.Path(__file__).parents[2]
PHOTOS = pathlib.Path(os.environ.get("RESNET_JAX_DATA", "nowhere")) / "imagenet100"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PHOTOS.is_dir(), reason="RESNET_JAX_DATA does not name a folder with imagenet100"),
]


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    files = sorted(PHOTOS.rglob("*.JPEG"))
    assert len(files) == 100
    return [file.read_bytes() for file in files]


def pillow(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def test_photos_are_decoded_as_pillow_does_bit_for_bit(photos):
    for content in photos:
        np.testing.assert_array_equal(decode(content), np.asarray(pillow(content)))


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_evaluation_sees_pillows_resize_256_and_centre_crop_within_a_grey_level(photos, method):
    for content in photos:
        image = pillow(content)
        scale = 256 / min(image.size)
        width, height = (256 if side == min(image.size) else int(side * scale + 1e-9) for side in image.size)
        resized = np.asarray(image.resize((width, height), Image.Resampling[method.upper()])).astype(int)
        top, left = round((height - 224) / 2), round((width - 224) / 2)
        seen = CenterCrop(224, 256, method)(content, np.empty(0)).astype(int)
        assert np.abs(seen - resized[top : top + 224, left : left + 224]).max() <= 1


def bilinear(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The whole image resized, from the definition: half-pixel centres, edges repeated."""
    resized = pixels.astype(np.float64)
    for axis, target in ((0, height), (1, width)):
        length = resized.shape[axis]
        at = np.clip((np.arange(target) + 0.5) * length / target - 0.5, 0, length - 1)
        low = np.minimum(at.astype(int), length - 2)
        shape = [1, 1, 1]
        shape[axis] = target
        share = (at - low).reshape(shape)
        resized = resized.take(low, axis) * (1 - share) + resized.take(low + 1, axis) * share
    return resized


def test_training_sees_plain_bilinear_crops_within_a_grey_level(photos):
    crop = ScaleCrop(reduced_dct=False)
    for i, content in enumerate(photos):
        uniforms = example_uniforms(0, 0, i, crop.draws)
        pixels = np.asarray(pillow(content))
        height, width = resized_shape(*pixels.shape[:2], crop.shorter_side(uniforms))
        top, left = crop.corner(height, width, uniforms)
        expected = bilinear(pixels, height, width)[top : top + 224, left : left + 224]
        assert np.abs(crop(content, uniforms) - expected).max() <= 1


def test_resnet_50_trains_and_evaluates_on_them_with_the_command_of_the_readme(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part).symlink_to(PHOTOS)
    command = [sys.executable, "-m", "resnet_jax.main", "--config=configs/imagenet_50.py",
               "--config.data.source=image_folder", f"--config.data.dir={tmp_path}", "--config.model.num_classes=100",
               "--config.batch_size=32", "--config.steps=3", f"--config.data.cache_dir={tmp_path / 'cache'}",
               f"--workdir={tmp_path / 'run'}"]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "waiting for data" in result.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["step"], summary["examples"], summary["broken_images"]) == (3, 100, 0)
    assert 0 <= summary["data_wait_percent"] <= 100
    (training, _) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(training["train_loss"])
    assert 0 <= training["data_wait_percent"] <= 100
