"""Labelled images for the commands that train.

Scikit-learn's handwritten digits, or a directory of MNIST-style IDX files.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn.arguments.errors import DataError

Images = NDArray[np.uint8]
Labels = NDArray[np.intp]

TEST_SHARE = 0.25
SPLIT_SEED = 0  # fixed: --seed changes the weights and the batches, never which images are kept for the test
GZIP_MAGIC = b"\x1f\x8b"
UNSIGNED_BYTES = 8  # IDX's code for the type of the values


class Dataset(NamedTuple):
    """Images as rows of pixels from 0 (paper) to `ink`, with their labels.

    `images` has shape (n, pixels) and `labels` (n,); `pixels` is an image's (height, width).
    """

    name: str
    pixels: tuple[int, int]
    ink: int
    images: Images
    labels: Labels
    test_images: Images
    test_labels: Labels

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return 1 + int(max(self.labels.max(), self.test_labels.max()))

    @property
    def chance(self) -> float:
        """Test accuracy of always answering with the commonest test label, the best that one can do without looking."""
        return float(np.bincount(self.test_labels).max()) / len(self.test_labels)


def load(directory: Path | None) -> Dataset:
    """What the option --data names: a directory of IDX files, or without one the digits."""
    return load_digits() if directory is None else load_idx(directory)


def load_digits() -> Dataset:
    """1797 handwritten digits of 8 x 8 pixels, which come inside scikit-learn.

    A quarter, the same always, is for the test.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    digits = datasets.load_digits()
    images, labels = digits.data.astype(np.uint8), digits.target.astype(np.intp)
    split = train_test_split(images, labels, test_size=TEST_SHARE, stratify=labels, random_state=SPLIT_SEED)
    return Dataset("scikit-learn's handwritten digits", (8, 8), 16, split[0], split[2], split[1], split[3])


def load_idx(directory: Path) -> Dataset:
    """Read the four files of MNIST, Fashion-MNIST and their kind.

    Parameters
    ----------
    directory : Path
        Holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each
        plain or compressed (.gz), also with "." for the last "-".

    Raises
    ------
    DataError
        No such directory, a file is missing or is not what its name promises, the files do not go together.
    """
    if not directory.is_dir():
        raise DataError(
            f"--data: {directory} is {'not a directory' if directory.exists() else 'not there'}; want a directory of "
            "IDX files"
        )
    names = [f"{part}-{values}-ubyte" for part in ("train", "t10k") for values in ("images-idx3", "labels-idx1")]
    found = {name: path for name in names if (path := _find(directory, name))}
    if missing := [name for name in names if name not in found]:
        raise DataError(
            f"--data: no {', no '.join(missing)} in {directory}; each may be plain or .gz, with '.' for the last '-' "
            "too"
        )
    images, labels = _labelled(found[names[0]], found[names[1]])
    test_images, test_labels = _labelled(found[names[2]], found[names[3]])
    if images.shape[1:] != test_images.shape[1:]:
        sizes = " and of ".join(" x ".join(map(str, stack.shape[1:])) for stack in (images, test_images))
        raise DataError(f"--data: training and test images in {directory} are of {sizes} pixels; want one size")
    pixels = (images.shape[1], images.shape[2])
    flat, flat_test = (stack.reshape(len(stack), -1) for stack in (images, test_images))
    return Dataset(str(directory), pixels, 255, flat, labels, flat_test, test_labels)


def _find(directory: Path, name: str) -> Path | None:
    dotted = ".idx".join(name.rsplit("-idx", 1))
    paths = (directory / f"{stem}{suffix}" for stem in (name, dotted) for suffix in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def _labelled(images_path: Path, labels_path: Path) -> tuple[Images, Labels]:
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(
            f"{images_path} has {len(images)} images, {labels_path.name} {len(labels)} labels; want as many of each"
        )
    if images.size == 0:
        raise DataError(f"{images_path}: holds no pixels (shape {images.shape}); want at least one image")
    return images, labels.astype(np.intp)


def read_idx(path: Path, ndim: int) -> Images:
    """Read one IDX file of unsigned bytes: a magic number, the shape as big-endian 32-bit integers, the values.

    Parameters
    ----------
    path : Path
        Plain or gzip, whatever its name.
    ndim : int
        Axes that the file must have: 3 for images, 1 for labels.

    Raises
    ------
    DataError
        Unreadable, corrupt, of another format, shorter or longer than its header says.
    """
    try:
        data = path.read_bytes()
        if data.startswith(GZIP_MAGIC):
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: corrupt gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror}") from error
    magic, start = bytes((0, 0, UNSIGNED_BYTES, ndim)), 4 + 4 * ndim
    if len(data) >= 4 and data[:4] != magic:
        raise DataError(
            f"{path}: begins with {data[:4].hex()}, want {magic.hex()}, an IDX file of unsigned bytes with {ndim} axes"
        )
    if len(data) < start:
        raise DataError(f"{path}: cut short: {len(data)} bytes, want {start} for the header alone; fetch it again")
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    if len(data) - start != math.prod(shape):
        wrong = "cut short" if len(data) - start < math.prod(shape) else "too long"
        promised = f"the {math.prod(shape):,} bytes of shape {' x '.join(map(str, shape))}"
        raise DataError(
            f"{path}: {wrong}: {len(data) - start:,} bytes after the header, want {promised}; fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
