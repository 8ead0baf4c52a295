"""Two public CIFAR-10 networks evaluated, averaged and looked into: a report with one command.

    python benchmarks/akamaster.py --weights=FOLDER --data=FOLDER --output=FOLDER

WEIGHTS holds akamaster-cifar10-resnet{20,56}.th (github.com/akamaster/pytorch_resnet_cifar10), DATA CIFAR-10 as
train/<class>/* and test/<class>/*. Their published test errors are 8.27 and 6.61%. Some minutes on two cores.
"""

import argparse
import pathlib
import subprocess
import sys


def main() -> None:
    """Flags in, four commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights", "data", "output"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    runs = []
    for depth in (20, 56):
        runs.append(str(arguments.output / f"akamaster_{depth}"))
        call("main", f"--config=cifar_{depth}", f"--workdir={runs[-1]}", "--mode=eval",
             f"--config.init.weights={arguments.weights / f'akamaster-cifar10-resnet{depth}.th'}",
             "--config.data.source=image_folder", f"--config.data.dir={arguments.data}")  # fmt: skip
    call("ensemble", f"--runs={','.join(runs)}")
    call("report", f"--runs={','.join(runs)}", f"--output={arguments.output}", "--analyze=responses")


def call(module: str, *flags: str) -> None:
    """Runs an entry point; its error ends this program too."""
    subprocess.run([sys.executable, "-m", f"resnet_jax.{module}", *flags], check=True)


if __name__ == "__main__":
    main()
