"""PASCAL VOC: the devkits of 2007 and 2012, and folders of one's own that are laid out as a devkit's year.

A year's folder holds ``Annotations/<name>.xml``, ``ImageSets/Main/<image set>.txt`` (a name a line) and
``JPEGImages/<name>.jpg`` (or what else can be decoded). The XML's boxes are 1-based and inclusive.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
import math
import os
import pathlib
from typing import NamedTuple, TypeVar
from xml.etree import ElementTree
from xml.parsers import expat

from resnet_jax.data.decode import EXTENSIONS, BrokenImage, image_shape
from resnet_jax.detection.annotations import (
    AnnotatedImage,
    Annotations,
    annotated_image,
    box_fault,
    check_ids,
    join,
    report_fault,
)
from resnet_jax.errors import UsageError, did_you_mean

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# (year, image set) of what is trained and tested on. The paper's VOC07 is trained on 07+12, its VOC12 on 07++12.
SETS = {
    "07_trainval": ((2007, "trainval"),),
    "07_test": ((2007, "test"),),
    "12_train": ((2012, "train"),),
    "12_val": ((2012, "val"),),
    "12_trainval": ((2012, "trainval"),),
    "12_test": ((2012, "test"),),
    "07+12": ((2007, "trainval"), (2012, "trainval")),
    "07++12": ((2007, "trainval"), (2007, "test"), (2012, "trainval")),
}

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


class _Object(NamedTuple):
    """An object of an annotation file: its box is (left, top, right, bottom), ``line`` that of its <object>."""

    name: str
    box: tuple[float, ...]
    difficult: bool
    line: str


class _Annotation(NamedTuple):
    width: int
    height: int
    objects: list[_Object]


def read_devkit(
    folder: str, name: str, classes: tuple[str, ...] | None = CLASSES, labelled: bool = True, on_error: str = "raise"
) -> Annotations:
    """Reads one of ``SETS`` from a folder that holds VOC2007 and VOC2012 (or VOCdevkit, and that those).

    Args:
      folder: VOCdevkit, or where it was unpacked.
      name: of the set.
      classes, labelled, on_error: see ``read_voc``; 12_test has no annotations, so it takes ``labelled=False``.

    Raises:
      UsageError: as ``read_voc``; an unknown set; a missing year.
    """
    if name not in SETS:
        raise UsageError(f"VOC set {name} is unknown{did_you_mean(name, SETS)} ({', '.join(SETS)})")
    root = pathlib.Path(folder).expanduser()
    kit = root / "VOCdevkit" if (root / "VOCdevkit").is_dir() else root
    parts = []
    for year, image_set in SETS[name]:
        if not (kit / f"VOC{year}").is_dir():
            raise UsageError(f"{kit}: no folder VOC{year} in it, of which {name} needs {image_set}")
        parts.append(read_voc(str(kit / f"VOC{year}"), image_set, classes, labelled, on_error))
    return join(parts, f"{kit}: {name}")


def read_voc(
    folder: str,
    image_set: str,
    classes: tuple[str, ...] | None = CLASSES,
    labelled: bool = True,
    on_error: str = "raise",
) -> Annotations:
    """Reads the annotations of one image set of a year, or of a folder laid out so; decodes no image.

    Args:
      folder: holds Annotations, ImageSets and JPEGImages.
      image_set: a file of ImageSets/Main, without its ending: ``trainval``.
      classes: in the order of their labels; None: all that the folder's annotations name, sorted (those of its other
        image sets too, so that training and test agree).
      labelled: False lists images alone, those of a test set whose boxes are kept secret.
      on_error: ``skip`` leaves boxes out that are empty, inverted or outside the image, and says so.

    Returns:
      The image set, in its file's order.

    Raises:
      UsageError: something is missing, malformed, listed twice or of an unknown class: file and line.
    """
    root = pathlib.Path(folder).expanduser().resolve()
    for part in ("Annotations",) * labelled + ("ImageSets/Main", "JPEGImages"):
        if not (root / part).is_dir():
            raise UsageError(
                f"{root}: no folder {part} in it (expected Annotations, ImageSets/Main and JPEGImages, as in VOC2007)"
            )
    listed = _image_set(root / "ImageSets" / "Main", image_set)
    if classes is None:
        classes = _classes(root / "Annotations")
    label = {name: i for i, name in enumerate(classes)}
    files = _image_files(root / "JPEGImages")

    def one(item: tuple[str, str]) -> AnnotatedImage:
        name, where = item
        if name not in files:
            raise UsageError(f"{where}: no image {root / 'JPEGImages' / name}.jpg (or {', '.join(EXTENSIONS[1:])})")
        if len(files[name]) > 1:
            raise UsageError(f"{where}: {name} is more than one image ({', '.join(sorted(files[name]))})")
        path = str(root / "JPEGImages" / files[name][0])
        if not labelled:
            return annotated_image(name, path, *_size(path), [], [])
        xml = root / "Annotations" / f"{name}.xml"
        if not xml.is_file():
            raise UsageError(f"{where}: no annotation {xml}")
        annotation = _read_annotation(xml)
        objects = [found for found in annotation.objects if _usable(found, annotation, xml, label, on_error)]
        return annotated_image(
            name,
            path,
            annotation.width,
            annotation.height,
            [found.box for found in objects],
            [label[found.name] for found in objects],
            [found.difficult for found in objects],
        )

    images = tuple(_in_parallel(one, listed))
    check_ids(images, str(root / "ImageSets" / "Main" / f"{image_set}.txt"))
    return Annotations(classes, tuple(range(1, len(classes) + 1)), images)


def _usable(found: _Object, annotation: _Annotation, xml: pathlib.Path, label: dict[str, int], on_error: str) -> bool:
    """Whether the box can be used; a class that is not in the list ends the reading in any case."""
    where = f"{xml}, line {found.line}"
    if found.name not in label:
        raise UsageError(f"{where}: class {found.name!r} is not in the list{did_you_mean(found.name, label)}")
    fault = box_fault(found.box, annotation.width, annotation.height)
    if fault:
        left, top, right, bottom = found.box
        drawn = f"({left + 1:g}, {top + 1:g}, {right:g}, {bottom:g})"
        report_fault(where, f"box {drawn} of {found.name!r} {fault}", on_error)
    return not fault


def _in_parallel(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Threads make network file systems bearable; the first mistake ends it."""
    with ThreadPoolExecutor(16) as pool:
        try:
            return list(pool.map(function, items))
        except BaseException:  # Ctrl-C too: thousands may be waiting.
            pool.shutdown(cancel_futures=True)
            raise


def _image_set(folder: pathlib.Path, image_set: str) -> list[tuple[str, str]]:
    """(name, file and line) of the images of a set."""
    path = folder / f"{image_set}.txt"
    if not path.is_file():
        there = sorted(file.stem for file in folder.glob("*.txt"))
        raise UsageError(f"{path}: no such image set{did_you_mean(image_set, there)}")
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a readable text file ({error})") from error
    listed = [(line.strip(), f"{path}, line {i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not listed:
        raise UsageError(f"{path}: no image in it (expected a name a line)")
    return listed


def _image_files(folder: pathlib.Path) -> dict[str, list[str]]:
    """The image files of a folder by their names without ending."""
    files: dict[str, list[str]] = {}
    for entry in os.scandir(folder):
        stem, ending = os.path.splitext(entry.name)
        if ending.lower() in EXTENSIONS:
            files.setdefault(stem, []).append(entry.name)
    return files


def _classes(folder: pathlib.Path) -> tuple[str, ...]:
    """Every class that an annotation of the folder names, sorted."""
    annotations = _in_parallel(_read_annotation, sorted(folder.glob("*.xml")))
    names = {found.name for annotation in annotations for found in annotation.objects}
    if not names:
        raise UsageError(f"{folder}: no annotation with an object in it")
    return tuple(sorted(names))


def _size(path: str) -> tuple[int, int]:
    """(width, height) from the image's header."""
    try:
        height, width = image_shape(pathlib.Path(path).read_bytes())
    except (OSError, BrokenImage) as error:
        raise UsageError(f"{path}: not a readable image ({error})") from error
    return width, height


def _read_annotation(path: pathlib.Path) -> _Annotation:
    """Reads an annotation file.

    Raises:
      UsageError: with the line, where it is malformed or something is missing.
    """
    try:
        root = _parse(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: not readable ({error.strerror})") from error
    except expat.ExpatError as error:
        reason = expat.errors.messages[error.code]
        raise UsageError(f"{path}, line {error.lineno}: not well-formed XML ({reason})") from error
    except (LookupError, ValueError) as error:  # Of an encoding that nobody knows.
        raise UsageError(f"{path}: not readable XML ({error})") from error
    size = _child(path, root, "size")
    width, height = (_number(path, size, side) for side in ("width", "height"))
    if not (width >= 1 and height >= 1 and width == int(width) and height == int(height)):
        raise UsageError(f"{path}, line {size.get('line')}: an image of {width:g} x {height:g} pixels")
    objects = []
    for element in root.findall("object"):
        # Of the boxes of its parts (head, hands) nothing is asked.
        box = _child(path, element, "bndbox")
        left, top, right, bottom = (_number(path, box, corner) for corner in _CORNERS)
        difficult = _number(path, element, "difficult") if element.find("difficult") is not None else 0
        if difficult not in (0, 1):
            raise UsageError(f"{path}, line {element.get('line')}: <difficult> is {difficult:g}, neither 0 nor 1")
        name = _text(path, element, "name")
        # Many tools count from 0 where VOC does from 1; only at the edge it shows.
        corner = (left - 1 if left else 0.0, top - 1 if top else 0.0)
        objects.append(_Object(name, (*corner, right, bottom), difficult == 1, element.get("line", "")))
    return _Annotation(int(width), int(height), objects)


def _parse(content: bytes) -> ElementTree.Element:
    """The XML's tree, in which every element has the attribute ``line``: ElementTree's own parser forgets them."""
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = lambda tag, _: builder.start(tag, {"line": str(parser.CurrentLineNumber)})
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.Parse(content, True)
    return builder.close()


def _child(path: pathlib.Path, element: ElementTree.Element, tag: str) -> ElementTree.Element:
    child = element.find(tag)
    if child is None:
        raise UsageError(f"{path}, line {element.get('line')}: <{element.tag}> has no <{tag}>")
    return child


def _text(path: pathlib.Path, element: ElementTree.Element, tag: str) -> str:
    child = _child(path, element, tag)
    text = (child.text or "").strip()
    if not text:
        raise UsageError(f"{path}, line {child.get('line')}: <{tag}> is empty")
    return text


def _number(path: pathlib.Path, element: ElementTree.Element, tag: str) -> float:
    text = _text(path, element, tag)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        line = _child(path, element, tag).get("line")
        raise UsageError(f"{path}, line {line}: <{tag}> is {text!r}, not a number")
    return value
