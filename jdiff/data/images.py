"""A folder or a .zip of images, one folder a class."""

import io
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from .dataset import Dataset, from_arrays

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
IN_MEMORY_BYTES = 4 * 2**30


def load_images(path: Path, split: str | None, size: int | None) -> Dataset:
    """The images below `path`: sorted by name, labelled by the folder that holds each, classes sorted too.

    Files of other kinds, and hidden ones, are passed over. Grey images stay grey (C = 1) if all are grey,
    else all become RGB; transparency is dropped. Up to 4 GiB are decoded at once and kept, which also proves
    every file; above that, the headers are checked now and images are decoded as they are read.

    Raises FileNotFoundError if no image is found, ValueError that names the file for a broken image, for a
    depth of more than 8 bits, and for images of different sizes without `size`.
    """
    files, fetch = _list(path, split)
    labels, class_names = _classes(files, path)
    mode, height, width = _headers(files, fetch, size)
    shape = (height, width, 3 if mode == "RGB" else 1)
    label = f"{path.name}/{split}" if split else path.stem if path.suffix == ".zip" else path.name

    def read(indices):
        out = np.empty((len(indices), *shape), np.uint8)
        for row, i in enumerate(indices):
            out[row] = _decode(files[i], fetch(files[i]), mode, size).reshape(shape)
        return out, labels[indices]

    if len(files) * int(np.prod(shape)) > IN_MEMORY_BYTES:
        return Dataset(label, len(files), shape, class_names, read)
    images = np.empty((len(files), *shape), np.uint8)
    for i in track(range(len(files)), f"decoding {label}", len(files)):
        images[i] = _decode(files[i], fetch(files[i]), mode, size).reshape(shape)
    return from_arrays(label, images, labels, class_names)


def fit(image, size: int | None):
    """The central square of a Pillow image, resized to size x size (bicubic, antialiased), or the image."""
    if size is None or image.size == (size, size):
        return image
    from PIL import Image

    side, (w, h) = min(image.size), image.size
    left, top = (w - side) // 2, (h - side) // 2
    square = image.crop((left, top, left + side, top + side))  # `resize(box=...)` would look beyond the box
    return square.resize((size, size), Image.Resampling.BICUBIC)


def track(items: Iterable, what: str, total: int) -> Iterable:
    """`items`, with a progress bar on the error stream where it takes long enough to want one."""
    if total < 5000:
        return items
    from rich.console import Console
    from rich.progress import track as bar

    return bar(items, what, total, console=Console(stderr=True), transient=True)


def _list(path: Path, split: str | None) -> tuple[list[str], Callable[[str], bytes]]:
    """The image files below path (and split), and how to get the bytes of one."""
    archive = path
    if split and path.is_dir() and (path / f"{split}.zip").is_file():
        archive, split = path / f"{split}.zip", None
    if archive.is_dir():
        root = archive / split if split else archive
        names = [p.relative_to(root).as_posix() for p in root.rglob("*")]

        def from_folder(name):
            return (root / name).read_bytes()

        fetch = from_folder
    elif zipfile.is_zipfile(archive):
        zipped = zipfile.ZipFile(archive)
        root = f"{archive}/{split}" if split else archive
        prefix = f"{split}/" if split else ""
        names = [name.removeprefix(prefix) for name in zipped.namelist() if name.startswith(prefix)]

        def from_zip(name):
            return zipped.read(prefix + name)

        fetch = from_zip
    else:
        raise ValueError(f"{str(path)!r} is neither a folder nor a .zip archive that can be read")
    files = sorted(name for name in names if _is_image(PurePosixPath(name)))
    if not files:
        raise FileNotFoundError(f"no image ({', '.join(sorted(SUFFIXES))}) in {str(root)!r}")
    return files, fetch


def _is_image(path: PurePosixPath) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def _classes(files: list[str], path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    folders = [os.path.dirname(file) for file in files]
    if not all(folders) and any(folders):
        stray = files[folders.index("")]
        raise ValueError(f"{str(path)!r} holds images in one folder a class, but {stray!r} lies beside the folders")
    names = sorted(set(folders))
    common = os.path.commonpath(names) if len(names) > 1 else os.path.dirname(names[0])
    label_of = {name: i for i, name in enumerate(names)}
    class_names = tuple(os.path.relpath(name, common) if name else path.stem for name in names)
    return np.array([label_of[folder] for folder in folders], np.int32), class_names


def _headers(files: list[str], fetch, size: int | None) -> tuple[str, int, int]:
    """The common mode ("L" or "RGB"), height and width, from the headers alone."""
    from PIL import Image

    sizes: dict[tuple[int, int], str] = {}
    modes = set()
    for file in track(files, "reading headers", len(files)):
        try:
            with Image.open(io.BytesIO(fetch(file))) as image:
                sizes.setdefault(image.size, file)
                modes.add(image.mode)
        except Exception as error:  # Pillow's plugins raise nearly anything for a broken file
            raise ValueError(f"{file!r} is a broken image: {error}") from error
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise ValueError(f"{file!r} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits first")
    if size is None and len(sizes) > 1:
        (a, first), (b, second) = list(sizes.items())[:2]
        raise ValueError(
            f"images of different sizes: {first!r} is {a[0]} x {a[1]}, {second!r} is {b[0]} x {b[1]} "
            "(width x height); give `size` to crop and resize them"
        )
    width, height = (size, size) if size else next(iter(sizes))
    return "L" if modes <= {"L", "1", "LA"} else "RGB", height, width


def _decode(file: str, data: bytes, mode: str, size: int | None) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(fit(image.convert(mode), size))
    except Exception as error:
        raise ValueError(f"{file!r} is a broken image: {error}") from error
