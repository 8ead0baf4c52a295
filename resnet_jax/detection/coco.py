"""COCO's annotations (``instances_*.json``), and data of one's own in that format.

Layouts: ``annotations/instances_<split>.json`` with images in ``<split>/``, as COCO itself unpacks; or
``<split>/_annotations.coco.json`` beside its images, as labelling tools export it.
"""

from collections.abc import Mapping, Sequence
import json
import math
import os
import pathlib
from typing import Any

from resnet_jax.detection.annotations import (
    AnnotatedImage,
    Annotations,
    annotated_image,
    box_fault,
    report_fault,
)
from resnet_jax.errors import UsageError, did_you_mean


def read_split(
    folder: str, split: str, classes: Sequence[str] | None = None, labelled: bool = True, on_error: str = "raise"
) -> Annotations:
    """Reads a split (``train2017``) of a folder in one of the layouts above; the rest as ``read_coco``."""
    root = pathlib.Path(folder).expanduser().resolve()
    places = _places(root, split, labelled)
    for path in places:
        if path.is_file():
            return read_coco(str(path), str(root / split), classes, labelled, on_error)
    raise UsageError(f"{root}: neither {' nor '.join(str(path.relative_to(root)) for path in places)} in it")


def has_split(folder: str, split: str) -> bool:
    """Whether ``read_split`` would find the annotations of a split."""
    return any(path.is_file() for path in _places(pathlib.Path(folder).expanduser(), split, labelled=True))


def _places(root: pathlib.Path, split: str, labelled: bool) -> tuple[pathlib.Path, ...]:
    official = root / "annotations" / f"{'instances' if labelled else 'image_info'}_{split}.json"
    return official, root / split / "_annotations.coco.json"


def read_coco(
    file: str, images: str, classes: Sequence[str] | None = None, labelled: bool = True, on_error: str = "raise"
) -> Annotations:
    """Reads a JSON file of annotations; opens no image.

    Args:
      file: in COCO's format: ``images``, ``categories``, ``annotations``.
      images: the folder below which the images' ``file_name`` lie.
      classes: names of categories in the order of their labels; None: all, in the order of their ids.
      labelled: False lists images alone, those of a test set whose boxes are kept secret.
      on_error: ``skip`` leaves boxes out that are empty, inverted or outside the image, and says so. COCO's own
        train2017 has a few of no width or height.

    Returns:
      The images in the file's order.

    Raises:
      UsageError: something is missing, malformed, listed twice or of an unknown category: the file and the id.
    """
    path = pathlib.Path(file).expanduser()
    content = load_json(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path}: not COCO's format (expected an object with images, annotations and categories)")
    category_ids, classes = _categories(path, content, classes)
    # As lists to be filled: image id -> (image, its annotations).
    listed = {image["id"]: (image, []) for image in _images(path, content, pathlib.Path(images).expanduser())}
    if labelled:
        label = {number: i for i, number in enumerate(category_ids)}
        for annotation in _list(path, content, "annotations"):
            where = _name(path, "annotation", annotation)
            image_id = _get(where, annotation, "image_id", int)
            if image_id not in listed:
                raise UsageError(f"{where}: there is no image {image_id}")
            image, found = listed[image_id]
            read = _annotation(where, annotation, image, label, on_error)
            if read:
                found.append(read)
    annotated = tuple(_annotated(image, found) for image, found in listed.values())
    if not annotated:
        raise UsageError(f"{path}: no image in it")
    return Annotations(classes, category_ids, annotated)


def load_json(path: pathlib.Path) -> Any:
    """Parses a file; a UsageError with line and column where it is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: not readable ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON ({error})") from error


def box_corners(where: str, bbox: Any) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of COCO's [left, top, width, height]; a UsageError where it is none."""
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(_is(side, float) for side in bbox)):
        raise UsageError(f"{where}: bbox is {json.dumps(bbox)}, not four numbers (left, top, width, height)")
    left, top, width, height = bbox
    return left, top, left + width, top + height


def _categories(
    path: pathlib.Path, content: Mapping[str, Any], classes: Sequence[str] | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The ids and the names of the classes, in the order of their labels."""
    names: dict[int, str] = {}
    for category in _list(path, content, "categories"):
        where = _name(path, "category", category)
        number, name = _get(where, category, "id", int), _get(where, category, "name", str)
        if number in names or name in names.values():
            raise UsageError(f"{where}: the id or the name {name!r} is listed twice")
        names[number] = name
    if not names:
        raise UsageError(f"{path}: no category in it")
    if classes is None:
        return tuple(sorted(names)), tuple(names[number] for number in sorted(names))
    numbers = {name: number for number, name in names.items()}
    for name in classes:
        if name not in numbers:
            raise UsageError(f"{path}: class {name!r} is no category of it{did_you_mean(name, numbers)}")
    return tuple(numbers[name] for name in classes), tuple(classes)


def _images(path: pathlib.Path, content: Mapping[str, Any], folder: pathlib.Path) -> list[dict[str, Any]]:
    """The file's ``images``, once known to be whole, there, and each listed once; ``path`` is added to each."""
    present: dict[str, set[str]] = {}  # What lies in a folder: one listing is cheaper than a look for every file.
    seen, images = set(), []
    for image in _list(path, content, "images"):
        where = _name(path, "image", image)
        number, name = _get(where, image, "id", int), _get(where, image, "file_name", str)
        if number in seen:
            raise UsageError(f"{where} is listed twice")
        seen.add(number)
        for side in ("width", "height"):
            if _get(where, image, side, int) < 1:
                raise UsageError(f"{where}: {side} is {image[side]}")
        parent, file = os.path.split(os.path.join(folder, name))
        if parent not in present:
            present[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
        if file not in present[parent]:
            raise UsageError(f"{where}: no file {os.path.join(parent, file)}")
        images.append({**image, "path": os.path.join(parent, file)})
    return images


def _annotation(
    where: str, annotation: Mapping[str, Any], image: Mapping[str, Any], label: dict[int, int], on_error: str
) -> tuple[tuple[float, ...], int, bool, float | None] | None:
    """(box, label, crowd, area) of an annotation; None where it is left out."""
    category = _get(where, annotation, "category_id", int)
    if category not in label:
        raise UsageError(f"{where} (image {image['id']}): category {category} is not in the list")
    box = box_corners(where, annotation.get("bbox"))
    fault = box_fault(box, image["width"], image["height"])
    if fault:
        report_fault(f"{where} (image {image['id']})", f"bbox {json.dumps(annotation['bbox'])} {fault}", on_error)
        return None
    crowd, area = annotation.get("iscrowd", 0), annotation.get("area")
    if crowd not in (0, 1):
        raise UsageError(f"{where}: iscrowd is {json.dumps(crowd)}, neither 0 nor 1")
    if area is not None and not (_is(area, float) and 0 <= area < math.inf):
        raise UsageError(f"{where}: area is {json.dumps(area)}, not a number of pixels")
    return box, label[category], bool(crowd), area


def _annotated(
    image: Mapping[str, Any], found: list[tuple[tuple[float, ...], int, bool, float | None]]
) -> AnnotatedImage:
    boxes, labels, crowd, area = zip(*found, strict=True) if found else ((), (), (), ())
    return annotated_image(
        image["id"], image["path"], image["width"], image["height"], boxes, labels, crowd=crowd, area=area
    )


def _list(path: pathlib.Path, content: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """A list of objects at the top of the file."""
    value = content.get(key)
    if not isinstance(value, list):
        raise UsageError(f"{path}: not COCO's format (no list {key!r})")
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise UsageError(f"{path}: {key}[{i}] is no object")
    return value


def _name(path: pathlib.Path, kind: str, item: Mapping[str, Any]) -> str:
    return f"{path}: {kind} {item.get('id')!r}"


def _is(value: Any, kind: type) -> bool:
    """Whether a JSON value is of a kind; truth values are no numbers, whole numbers are fractional ones too."""
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def _get(where: str, item: Mapping[str, Any], key: str, kind: type) -> Any:
    value = item.get(key)
    if not _is(value, kind):
        expected = {int: "a whole number", str: "a text"}[kind]
        raise UsageError(f"{where}: {key} is {json.dumps(value)}, not {expected}")
    return value
