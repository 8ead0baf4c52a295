"""A page about exported weights: what they are, how they were made, how to use them."""

import json
import pathlib
import platform
from typing import Any

import flax
import jax
import numpy as np

from resnet_jax import __version__
from resnet_jax.models.registry import default_input
from resnet_jax.output import write_whole
from resnet_jax.pretrained.load import Pretrained
from resnet_jax.pretrained.preprocessing import Preprocessing

_METRICS = {
    "top1_error": "top-1 error, %",
    "top5_error": "top-5 error, %",
    "loss": "loss",
    "examples": "images evaluated",
    "protocol": "protocol",
    "step": "steps",
    "epoch": "epochs",
}
_FRONT = "---\nlibrary_name: resnet_jax\npipeline_tag: image-classification\ntags: [resnet, jax, flax]\n---"
_USE = {
    ".safetensors": """import resnet_jax

module, variables, preprocessing = resnet_jax.load_pretrained("{file}")
images = preprocessing.normalise(pixels)  # Of uint8 [N, {size}, {size}, {channels}].
logits = module.apply(variables, images)""",
    ".stablehlo": """import pathlib
from jax import export

program = export.deserialize(pathlib.Path("{file}").read_bytes())
logits = program.call(images)  # Of uint8 images [N, {size}, {size}, {channels}]; the normalisation is inside.""",
}


def write_card(file: pathlib.Path, model: str, weights: Pretrained, content: str) -> pathlib.Path:
    """Writes ``FILE.md`` beside exported weights: Markdown with the front matter of the hub's cards.

    Args:
      file: the exported file, ``.safetensors`` or ``.stablehlo``.
      model: our name of the network.
      weights: what was exported.
      content: what is in the file, for people.

    Returns:
      The page's path.

    Raises:
      UsageError: it can't be written.
    """
    preprocessing, history = weights.preprocessing, weights.history
    metrics, config = history.get("metrics", {}), history.get("config")
    size = preprocessing.image_size if preprocessing else default_input(model)[0]
    channels = len(preprocessing.mean) if preprocessing else 3
    parameters = sum(leaf.size for leaf in jax.tree.leaves(weights.variables["params"]))
    origin = {
        "source": history.get("source", "not known"),
        "trained from": (config or {}).get("init.weights", ""),
        "content": content,
        "settings": json.dumps(weights.settings) if weights.settings else "",
        "resnet_jax": __version__,
        "jax, flax, numpy": f"{jax.__version__}, {flax.__version__}, {np.__version__}",
        "Python": platform.python_version(),
    }
    use = _USE[file.suffix]
    if not preprocessing:  # Then nobody can say what to do.
        use = use.replace("preprocessing.normalise(pixels)", "...")
    few = {"top5_error"} if weights.num_classes <= 5 else set()  # Of which five can't all be wrong.
    measured = {
        title: _figure(metrics[name]) for name, title in _METRICS.items() if name in metrics and name not in few
    }
    sections = {
        "": f"{model} with {parameters:,} parameters, {weights.num_classes} classes.\n\n{_table(origin)}",
        "Use": f"```python\n{use.format(file=file.name, size=size, channels=channels)}\n```",
        "Preprocessing": _table(_preprocessing(preprocessing)) if preprocessing else "Not known.",
        "Metrics": _table(measured) if measured else "None were measured with these weights here.",
        "Classes": _classes(weights),
        "Config": f"```json\n{json.dumps(config, indent=1)}\n```" if config else "",
    }
    body = (f"## {title}\n\n{text}" if title else text for title, text in sections.items() if text)
    path = file.with_name(file.name + ".md")
    text = "\n\n".join([_FRONT, f"# {file.name}", *body]) + "\n"
    write_whole(path, lambda page: page.write(text.encode()))
    return path


def _classes(weights: Pretrained) -> str:
    if weights.classes:
        return ", ".join(weights.classes)
    if weights.num_classes == 1000:
        return "Not named in the file; a thousand are taken for ImageNet's, in the order of their WordNet ids."
    return "Their names are not known."


def _preprocessing(values: Preprocessing) -> dict[str, Any]:
    size = values.image_size
    if values.resize is None:
        resize = f"the whole image to {size} x {size}, {values.interpolation}"
    else:
        resize = f"shorter side to {values.resize}, {values.interpolation}, then the middle {size} x {size}"
    mean = _figures(values.mean) if values.mean_image is None else "the per-pixel mean image in the file"
    return {
        "resize": resize,
        "mean, of values from 0 to 1": mean,
        "deviation": _figures(values.std),
    }


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value != "")])


def _figures(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _figure(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
