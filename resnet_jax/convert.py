"""Converts weights of any known format into .safetensors, or a program (.stablehlo) that needs no code of ours.

    python -m resnet_jax.convert --model=resnet50_v1_5 --weights=resnet50.pth --output=resnet50.safetensors
    python -m resnet_jax.convert --model=cifar_resnet20 --weights=runs/cifar_20 --output=net.stablehlo

A .safetensors has torchvision's names and shapes where torchvision has the network. A .stablehlo takes uint8 images
[N, size, size, 3] of any number and gives logits; jax.export.deserialize reads it.
"""

import pathlib

from absl import flags

from resnet_jax import cli
from resnet_jax.errors import UsageError

flags.DEFINE_string("model", None, "Our name of the network; for a run of ours its own when not given.")
flags.DEFINE_string("weights", None, "A .safetensors or torch file, or the work directory of a run.")
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

    from resnet_jax.pretrained import program, save, start

    model, weights = start.read_any(FLAGS.weights, FLAGS.model)
    print(f"{FLAGS.weights}: {model}, {weights.title}")
    if output.suffix == ".stablehlo":
        program.save_program(output, model, weights)
        size = program.input_size(model, weights)
        print(f"{output}: uint8 images [N, {size}, {size}, channels] -> logits")
    else:
        save.save_safetensors(output, model, weights)
        known = save.torchvision_names(model)
        names = "torchvision's names" if known else "our names, since torchvision has no such network"
        print(f"{output}: {names}")
    return 0


if __name__ == "__main__":
    cli.run(main, __doc__, needs=["weights", "output"])
