"""Prints the networks: layers, parameters, multiply-adds and output size per stage.

python -m resnet_jax.summary
python -m resnet_jax.summary --models='resnet50*,cifar_resnet164' --image_size=320
"""

from absl import flags

from resnet_jax import cli
from resnet_jax.errors import UsageError

flags.DEFINE_list("models", ["*"], "Names or shell patterns, separated by commas.")
flags.DEFINE_integer("image_size", None, "Side of the input in pixels; the paper's when not given.", lower_bound=1)
FLAGS = flags.FLAGS


def main(overrides: list[tuple[str, str]]) -> None:
    """Flags in, one table out."""
    del overrides
    from resnet_jax.models.registry import list_models
    from resnet_jax.models.summary import format_heading, format_row, summarize

    names = []
    for pattern in FLAGS.models:
        found = list_models(pattern) or [pattern]
        if found == [pattern] and any(letter in pattern for letter in "*?["):
            raise UsageError(f"--models={pattern}: no network's name matches")
        names += [name for name in found if name not in names]
    print(format_heading())
    for name in names:
        print(format_row(summarize(name, FLAGS.image_size)), flush=True)


if __name__ == "__main__":
    cli.run(main, __doc__)
