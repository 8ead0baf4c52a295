"""Fine-tuning against training from scratch for the same steps, in one run.

    python benchmarks/finetune.py --weights=akamaster-cifar10-resnet20.th --model=cifar_resnet20

The task is scikit-learn's digits as 32x32 RGB images, which the weights (of CIFAR-10) have never seen: 500 to learn
from, 359 to test. All runs have the same network, schedule and seeds; only the weights to begin with differ.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image

from resnet_jax.data import digits


def write_images(folder: pathlib.Path, train: int) -> None:
    """The digits as folders of PNGs."""
    data = digits.load()
    for part, images, count in (("train", data.train, train), ("test", data.test, len(data.test))):
        for i in range(count):
            place = folder / part / str(images.labels[i])
            place.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(np.repeat(images.images[i], 3, axis=-1))
            image.resize((32, 32), Image.Resampling.BICUBIC).save(place / f"{i:04}.png")


def main() -> None:
    """Runs both and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--train", type=int, default=500)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path, help="folder that keeps each run's log")
    args = parser.parse_args()
    contenders = {
        "from the weights": [f"--config.init.weights={pathlib.Path(args.weights).absolute()}"],
        "from scratch": ["--config.init.head=keep"],
        "from scratch, rate 0.1": ["--config.init.head=keep", "--config.schedule.learning_rate=0.1"],
    }
    print("| start | test error, % (seeds) | training error, % |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write_images(folder / "digits", args.train)
        for name, settings in contenders.items():
            errors, training = [], []
            for seed in range(args.seeds):
                run = folder / f"{name} {seed}".replace(" ", "_").replace(",", "")
                command = [
                    sys.executable, "-m", "resnet_jax.main", "--config=finetune_folder", f"--workdir={run}",
                    f"--config.model.name={args.model}", f"--config.data.dir={folder / 'digits'}",
                    f"--config.data.cache_dir={folder}", "--config.data.crop=whole", "--config.data.image_size=32",
                    "--config.data.flip=false", "--config.data.pad=2", f"--config.steps={args.steps}",
                    "--config.schedule.warmup_steps=10", "--config.schedule.learning_rate=0.01",
                    "--config.eval.every=0", "--config.eval.patience=0", f"--config.seed={seed}", *settings,
                ]  # fmt: skip
                subprocess.run(command, check=True, stdout=sys.stderr)
                summary = json.loads((run / "summary.json").read_text())
                errors.append(summary["top1_error"])
                training.append(summary["train_top1_error"])
                if args.output:
                    kept = args.output / run.name
                    kept.mkdir(parents=True, exist_ok=True)
                    for file in ("metrics.jsonl", "summary.json"):
                        shutil.copy(run / file, kept)
            seeds = ", ".join(f"{error:.2f}" for error in errors)
            print(f"| {name} | {statistics.mean(errors):.2f} ({seeds}) | {statistics.mean(training):.2f} |", flush=True)


if __name__ == "__main__":
    main()
