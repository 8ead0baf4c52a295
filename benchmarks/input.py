"""Images per second of the input pipeline beside torch's DataLoader (Pillow) and tf.data, in one run.

    python benchmarks/input.py --data_dir=FOLDER --workers=2
    python benchmarks/input.py --data_dir=FOLDER --crop=whole --size=32 --batch=128

FOLDER holds one folder per class. The list of files is repeated to --examples; all contenders read it in a random
order, decode, apply the same augmentation (scale: the paper's, with mirrors; whole: none) and give batches of uint8.
``torch, float`` adds what torchvision's references do in the workers: to float, normalise. Ours mirrors on the device.
Contenders take turns, each in a process of its own, --repeats times; medians and spreads are printed.
Memory is what all processes of a contender together take at most beyond what they took before the first batch was
asked for (proportional set size, so that shared pages count once).
"""

import argparse
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import threading
import time

import numpy as np


def list_files(folder: str, examples: int) -> list[str]:
    """The folder's files in a fixed order, repeated."""
    files = sorted(str(path) for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return [files[i % len(files)] for i in range(examples or len(files))]


def ours(args, processes: bool):
    """Batches of ours."""
    from resnet_jax.data.crops import ScaleCrop, Views, Whole
    from resnet_jax.data.image_folder import Files
    from resnet_jax.data.order import Order
    from resnet_jax.data.stream import Batches, Reader, Rows, TrainingPlan

    names = [os.fsencode(name) for name in list_files(args.data_dir, args.examples)]
    crop = ScaleCrop(args.size) if args.crop == "scale" else Whole(args.size)
    views = Views(Files(pathlib.Path("/"), names, [0] * len(names)), crop)
    reader = Reader(views, TrainingPlan(Order(0, len(names)), Rows(args.batch)), 0, "raise")
    batches = Batches(reader, 0, 1 << 40, args.workers, processes)
    yield
    for batch in batches:
        yield batch["images"]


def torch_loader(args, as_float: bool):
    """Batches of torch's DataLoader."""
    from PIL import Image
    import torch

    files = list_files(args.data_dir, args.examples)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    class Folder(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, i):
            with Image.open(files[i]) as image:
                image = image.convert("RGB")
            if args.crop == "scale":
                random = torch.rand(4).tolist()
                shorter = 256 + int(random[0] * 225)
                width, height = image.size
                scale = shorter / min(width, height)
                width, height = (shorter if side == min(image.size) else int(side * scale) for side in (width, height))
                left, top = int(random[1] * (width - args.size + 1)), int(random[2] * (height - args.size + 1))
                image = image.resize((width, height), Image.Resampling.BILINEAR)
                image = image.crop((left, top, left + args.size, top + args.size))
                if random[3] < 0.5:
                    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            elif image.size != (args.size, args.size):
                image = image.resize((args.size, args.size), Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.array(image))
            if as_float:
                return ((pixels.permute(2, 0, 1).contiguous().float() / 255) - mean) / std
            return pixels

    loader = torch.utils.data.DataLoader(Folder(), args.batch, shuffle=True, num_workers=args.workers, drop_last=True,
                                         persistent_workers=args.workers > 0)  # fmt: skip
    yield
    while True:
        for batch in loader:
            yield batch.numpy()


def tf_data(args):
    """Batches of tf.data; it has no worker count but threads, of which it gets as many."""
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    files = list_files(args.data_dir, args.examples)

    def load(path):
        content = tf.io.read_file(path)
        if args.crop == "whole":
            image = tf.io.decode_image(content, 3, expand_animations=False)
            return tf.ensure_shape(image, (args.size, args.size, 3))
        image = tf.io.decode_jpeg(content, 3)
        shape = tf.cast(tf.shape(image)[:2], tf.float32)
        shorter = tf.cast(tf.random.uniform((), 256, 481, tf.int32), tf.float32)
        image = tf.image.resize(image, tf.cast(shape * shorter / tf.reduce_min(shape) + 1e-3, tf.int32))
        image = tf.image.random_flip_left_right(tf.image.random_crop(image, (args.size, args.size, 3)))
        return tf.cast(tf.round(image), tf.uint8)

    data = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    data = data.map(load, num_parallel_calls=args.workers).batch(args.batch).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = args.workers
    batches = data.with_options(options).as_numpy_iterator()
    yield
    yield from batches


CONTENDERS = {
    "ours, threads": lambda args: ours(args, processes=False),
    "ours, processes": lambda args: ours(args, processes=True),
    "torch, uint8": lambda args: torch_loader(args, as_float=False),
    "torch, float": lambda args: torch_loader(args, as_float=True),
    "tf.data": tf_data,
}
NEEDS = {"torch, uint8": "torch", "torch, float": "torch", "tf.data": "tensorflow"}


def memory() -> int:
    """Proportional set size of this process and its children, bytes."""
    import psutil

    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def measure(args) -> dict:
    """Runs one contender for a while."""
    batches = CONTENDERS[args.contender](args)
    next(batches)  # Everything imported and listed, nothing read yet.
    before, peak, done = memory(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(2):
            peak = max(peak, memory())

    begun = time.perf_counter()
    next(batches)
    first = time.perf_counter() - begun
    for _ in range(args.warmup):
        next(batches)
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = last = time.perf_counter()
    latencies = []
    while last - start < args.seconds:
        assert len(next(batches)) == args.batch
        now = time.perf_counter()
        latencies.append(now - last)
        last = now
    done.set()
    watcher.join()
    p50, p99 = np.percentile(latencies, (50, 99)) * 1e3
    rate = args.batch * len(latencies) / (last - start)
    return {"rate": rate, "p50": p50, "p99": p99, "first": first, "memory": max(0, peak - before) / 2**20}


def main() -> None:
    """Runs the contenders in turns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--examples", type=int, default=0, help="repeat the files to so many; 0: as they are")
    parser.add_argument("--crop", choices=("scale", "whole"), default="scale")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--warmup", type=int, default=8, help="batches before the clock starts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="contenders, separated by semicolons")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(args)))
        sys.stdout.flush()
        os._exit(0)  # Some loaders are slow to let go.
    names = [name.strip() for name in args.only.split(";")] if args.only else list(CONTENDERS)
    names = [name for name in names if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(args.repeats):
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], f"--contender={name}"]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs[name].append(json.loads(output.splitlines()[-1]))
            print(f"{name}: {runs[name][-1]['rate']:.0f} images/s", file=sys.stderr, flush=True)
    cores = len(os.sched_getaffinity(0))
    print(f"{platform.processor() or platform.machine()}, {cores} cores,"
          f" Python {platform.python_version()};"
          f" {args.workers} workers, batch {args.batch}, {args.crop} crop of {args.size}\n")  # fmt: skip
    print("| pipeline | images/s (least-most) | per core | batch p50, p99 (ms) | first batch (s) | MiB a worker"
          " | ratio to torch, uint8 |\n|---|---|---|---|---|---|---|")  # fmt: skip
    middle = {key: {name: statistics.median(run[key] for run in runs[name]) for name in names}
              for key in ("rate", "p50", "p99", "first", "memory")}  # fmt: skip
    for name in names:
        rates = [run["rate"] for run in runs[name]]
        peer = runs.get("torch, uint8")
        ratios = [run["rate"] / other["rate"] for run, other in zip(runs[name], peer or [], strict=False)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "-"
        print(f"| {name} | {middle['rate'][name]:.0f} ({min(rates):.0f}-{max(rates):.0f})"
              f" | {middle['rate'][name] / min(cores, args.workers or 1):.0f}"
              f" | {middle['p50'][name]:.0f}, {middle['p99'][name]:.0f} | {middle['first'][name]:.1f}"
              f" | {middle['memory'][name] / max(1, args.workers):.0f} | {ratio} |")  # fmt: skip


if __name__ == "__main__":
    main()
