"""What a table of the paper's is (arXiv:1512.03385), and those of classification, with public reproductions.

All figures are percentages.
"""

import dataclasses
from typing import Any

TOP1, TOP5 = "top1_error", "top5_error"


@dataclasses.dataclass(frozen=True)
class Row:
    """One network's row.

    Attributes:
      title: its name in the paper.
      paper: what is printed, in the order of the table's columns; None for a dash.
      models: our names of the same network; none for others' methods, which are there to compare with.
      config: the shipped config that is the same experiment; a run with another recipe is a remark.
      mean: the printed mean of several runs, in the order of the columns.
      public: what reproductions got: whose -> figures in the order of the columns.
      remark: what else is printed, or sets the row apart.
      settings: fields in which the experiment differs from ``config`` and from the table's ``settings``.
      protocol: the row's own test protocol; empty: the table's.
    """

    title: str
    paper: tuple[float | None, ...] = ()
    models: tuple[str, ...] = ()
    config: str = ""
    public: dict[str, tuple[float | None, ...]] = dataclasses.field(default_factory=dict)
    remark: str = ""
    mean: tuple[float, ...] = ()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    protocol: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of errors or average precisions.

    Attributes:
      title: with its number in the paper.
      data: as of ``runs.Run``.
      protocol: the test protocol, as of ``eval.protocol``.
      columns: the metrics, as in ``summary.json``.
      rows: in the paper's order.
      note: what a reader should know.
      task: whose runs are looked at.
      settings: fields in which the experiments differ from the rows' configs.
      rises: whether more is better.
      places: decimals, as many as are printed.
    """

    title: str
    data: str
    protocol: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    task: str = "classification"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    rises: bool = False
    places: int = 2

    def protocol_of(self, row: Row) -> str:
        """The test protocol of a row."""
        return row.protocol or self.protocol


# Table 1: depth -> multiply-adds as printed.
MULTIPLY_ADDS = {18: 1.8e9, 34: 3.6e9, 50: 3.8e9, 101: 7.6e9, 152: 11.3e9}

TABLE_2 = Table(
    "Table 2: ImageNet validation, 10-crop",
    "imagenet",
    "ten_crop",
    (TOP1,),
    (
        Row("plain-18", (27.94,), ("plain18",), "imagenet_plain_18"),
        Row("plain-34", (28.54,), ("plain34",), "imagenet_plain_34"),
        Row("ResNet-18", (27.88,), ("resnet18_a",), "imagenet_18_a"),
        Row("ResNet-34", (25.03,), ("resnet34_a",), "imagenet_34_a"),
    ),
    "The residual nets have parameter-free shortcuts (option A), so as many parameters as the plain ones.",
)
TABLE_3 = Table(
    "Table 3: ImageNet validation, 10-crop",
    "imagenet",
    "ten_crop",
    (TOP1, TOP5),
    (
        Row("VGG-16", (28.07, 9.33), ("vgg16",), "imagenet_vgg_16"),
        Row("GoogLeNet", (None, 9.15)),
        Row("PReLU-net", (24.27, 7.38)),
        Row("plain-34", (28.54, 10.02), ("plain34",), "imagenet_plain_34"),
        Row("ResNet-34 A", (25.03, 7.76), ("resnet34_a",), "imagenet_34_a"),
        Row("ResNet-34 B", (24.52, 7.46), ("resnet34", "resnet34_b"), "imagenet_34"),
        Row("ResNet-34 C", (24.19, 7.40), ("resnet34_c",), "imagenet_34_c"),
        Row("ResNet-50", (22.85, 6.71), ("resnet50",), "imagenet_50", {"authors' weights": (22.9, 6.7)}),
        Row("ResNet-101", (21.75, 6.05), ("resnet101",), "imagenet_101", {"authors' weights": (21.8, 6.1)}),
        Row("ResNet-152", (21.43, 5.71), ("resnet152",), "imagenet_152", {"authors' weights": (21.4, 5.7)}),
    ),
)
TABLE_4 = Table(
    "Table 4: ImageNet validation, single models, fully convolutional at several scales",
    "imagenet",
    "multi_scale",
    (TOP1, TOP5),
    (
        Row("VGG (ILSVRC'14)", (None, 8.43)),
        Row("GoogLeNet (ILSVRC'14)", (None, 7.89)),
        Row("VGG (v5)", (24.4, 7.1), ("vgg16",), "imagenet_vgg_16"),
        Row("PReLU-net", (21.59, 5.71)),
        Row("BN-inception", (21.99, 5.81)),
        Row("ResNet-34 B", (21.84, 5.71), ("resnet34", "resnet34_b"), "imagenet_34"),
        Row("ResNet-34 C", (21.53, 5.60), ("resnet34_c",), "imagenet_34_c"),
        Row("ResNet-50", (20.74, 5.25), ("resnet50",), "imagenet_50"),
        Row("ResNet-101", (19.87, 4.60), ("resnet101",), "imagenet_101"),
        Row("ResNet-152", (19.38, 4.49), ("resnet152",), "imagenet_152"),
    ),
)
TABLE_5 = Table(
    "Table 5: ImageNet test, ensembles",
    "imagenet",
    "multi_scale",
    (TOP5,),
    (
        Row("VGG (ILSVRC'14)", (7.32,)),
        Row("GoogLeNet (ILSVRC'14)", (6.66,)),
        Row("VGG (v5)", (6.8,)),
        Row("PReLU-net", (4.94,)),
        Row("BN-inception", (4.82,)),
        Row("ResNet (ILSVRC'15)", (3.57,), ("an ensemble",), remark="six models, two of 152 layers"),
    ),
    "Measured by the test server, whose labels nobody has; `predict --submission` writes what it takes.",
)
TABLE_6 = Table(
    "Table 6: CIFAR-10 test",
    "cifar10",
    "center",
    (TOP1,),
    (
        Row("Maxout", (9.38,)),
        Row("NIN", (8.81,)),
        Row("DSN", (8.22,)),
        Row("FitNet-19", (8.39,)),
        Row("Highway-19", (7.54,), remark="mean 7.72 +- 0.16"),
        Row("Highway-32", (8.80,)),
        Row("ResNet-20", (8.75,), ("cifar_resnet20",), "cifar_20", {"akamaster": (8.27,)}),
        Row("ResNet-32", (7.51,), ("cifar_resnet32",), "cifar_32", {"akamaster": (7.37,)}),
        Row("ResNet-44", (7.17,), ("cifar_resnet44",), "cifar_44", {"akamaster": (6.90,)}),
        Row("ResNet-56", (6.97,), ("cifar_resnet56",), "cifar_56", {"akamaster": (6.61,)}),
        Row(
            "ResNet-110",
            (6.43,),
            ("cifar_resnet110",),
            "cifar_110",
            {"akamaster": (6.32,)},
            "mean 6.61 +- 0.16 of five runs",
            mean=(6.61,),
        ),
        Row("ResNet-1202", (7.93,), ("cifar_resnet1202",), "cifar_1202", {"akamaster": (6.18,)}),
    ),
)
FIGURE_6 = Table(
    "Beside Table 6: the networks of figure 6 whose errors are not printed, and gated shortcuts",
    "cifar10",
    "center",
    (TOP1,),
    (
        Row("plain-20", (None,), ("cifar_plain20",), "cifar_plain_20", remark="the error rises with the depth"),
        Row("plain-32", (None,), ("cifar_plain32",), "cifar_plain_32"),
        Row("plain-44", (None,), ("cifar_plain44",), "cifar_plain_44"),
        Row("plain-56", (None,), ("cifar_plain56",), "cifar_plain_56"),
        Row("plain-110", (None,), ("cifar_plain110",), "cifar_plain_110", remark="above 60"),
        Row(
            "gated-20",
            (None,),
            ("cifar_highway20",),
            "cifar_highway_20",
            remark="our gates on ResNet-20; not the printed Highway-19",
        ),
        Row(
            "gated-32",
            (None,),
            ("cifar_highway32",),
            "cifar_highway_32",
            remark="our gates on ResNet-32; not the printed Highway-32",
        ),
    ),
)
SINGLE_CROP = Table(
    "ImageNet validation, one crop (not printed in the paper)",
    "imagenet",
    "center",
    (TOP1, TOP5),
    (
        Row("ResNet-18", (None, None), ("resnet18",), "imagenet_18",
            {"fb.resnet.torch": (30.43, None), "torchvision V1": (30.24, None)}),
        Row("ResNet-34", (None, None), ("resnet34", "resnet34_b"), "imagenet_34",
            {"fb.resnet.torch": (26.73, None), "torchvision V1": (26.69, None)}),
        Row("ResNet-50", (None, None), ("resnet50",), "imagenet_50", {"authors' weights": (24.7, 7.8)}),
        Row("ResNet-101", (None, None), ("resnet101",), "imagenet_101", {"authors' weights": (23.6, 7.1)}),
        Row("ResNet-152", (None, None), ("resnet152",), "imagenet_152", {"authors' weights": (23.0, 6.7)}),
        Row("ResNet-50 v1.5", (None, None), ("resnet50_v1_5",), public={
                "fb.resnet.torch": (24.01, None), "torchvision V1": (23.87, None), "torchvision V2": (19.14, None),
             "timm a1": (19.62, None)}),
        Row("ResNet-101 v1.5", (None, None), ("resnet101_v1_5",), public={
                "fb.resnet.torch": (22.44, None), "torchvision V1": (22.63, None), "torchvision V2": (18.11, None)}),
        Row("ResNet-152 v1.5", (None, None), ("resnet152_v1_5",), public={
                "fb.resnet.torch": (22.16, None), "torchvision V1": (21.69, None), "torchvision V2": (17.72, None)}),
    ),
    "torchvision's V2 and timm's a1 are newer recipes; flax's example reports 23.3 to 23.6 for ResNet-50 without the"
    " last images of the set.",
)  # fmt: skip
TABLES = (TABLE_6, FIGURE_6, TABLE_2, TABLE_3, TABLE_4, SINGLE_CROP, TABLE_5)
