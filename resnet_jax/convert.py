"""Converts weights of any known format into .safetensors, or a program (.stablehlo) that needs no code of ours.

    python -m resnet_jax.convert --model=resnet50_v1_5 --weights=resnet50.pth --output=resnet50.safetensors
    python -m resnet_jax.convert --model=cifar_resnet20 --weights=runs/cifar_20 --output=net.stablehlo

A .safetensors has torchvision's names and shapes where torchvision has the network. A .stablehlo takes uint8 images
[N, size, size, 3] of any number and gives logits; jax.export.deserialize reads it. Beside the file goes a page about
it (FILE.md).
"""

import pathlib

from absl import flags

from resnet_jax import cli
from resnet_jax.errors import UsageError

flags.DEFINE_string("model", None, "Our name of the network; runs, files of ours and timm's know their own.")
flags.DEFINE_string(
    "weights",
    None,
    "A file (.safetensors, .pth, .th, .caffemodel, .h5), the work directory of a run, hf:OWNER/NAME, or"
    " https://...#sha256=DIGITS.",
)
flags.DEFINE_string("output", None, "The file to write: .safetensors or .stablehlo.")
FLAGS = flags.FLAGS


def main(overrides: list[tuple[str, str]]) -> int:
    """Flags in, one call."""
    if overrides:
        raise UsageError(f"--config.{overrides[0][0]} is no setting of convert; --help lists them")
    output = pathlib.Path(FLAGS.output).expanduser()
    if output.suffix not in (".safetensors", ".stablehlo"):
        raise UsageError(f"--output={FLAGS.output}: the file's name ends in .safetensors or .stablehlo")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"--output={FLAGS.output}: no folder {output.absolute().parent}")

    from resnet_jax.pretrained import card, program, save, source

    model, weights = source.read_weights(FLAGS.weights, FLAGS.model)
    print(f"{FLAGS.weights}: {model}, {weights.title}")
    if output.suffix == ".stablehlo":
        program.save_program(output, model, weights)
        size, channels = program.input_size(model, weights), len(weights.preprocessing.mean)
        content = f"uint8 images [N, {size}, {size}, {channels}] -> logits"
    else:
        save.save_safetensors(output, model, weights)
        known = save.torchvision_names(model, weights)
        content = "torchvision's names" if known else "our names, since torchvision has no such network"
    try:
        page = card.write_card(output, model, weights, content)
    except UsageError:
        output.unlink()
        raise
    print(f"{output}: {content}")
    print(f"{page}: what it is and how to use it")
    return 0


if __name__ == "__main__":
    cli.run(main, __doc__, needs=["weights", "output"])
