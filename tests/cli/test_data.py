"""Labelled images: scikit-learn's digits and IDX files, good and bad."""

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastbn.arguments.errors import DataError
from fastbn.cli.train.data import Dataset, load_digits, load_idx, read_idx

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array: np.ndarray) -> bytes:
    """An array of bytes as an IDX file, after the format's description."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def arrays(train: int = 7, test: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 256, (n, 3, 2)) if images else np.arange(n) % 3
        for n in (train, test)
        for images in (True, False)
    ]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, array in zip(NAMES, arrays(), strict=True):
        (tmp_path / name).write_bytes(idx(array))
    return tmp_path


def assert_holds(data: Dataset, given: list[np.ndarray]) -> None:
    for found, want in zip((data.images, data.test_images), (given[0], given[2]), strict=True):
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, want.reshape(len(want), -1))
    for found, want in zip((data.labels, data.test_labels), (given[1], given[3]), strict=True):
        np.testing.assert_array_equal(found, want)


def test_digits_are_whole_and_split_the_same_way_each_time() -> None:
    data, again = load_digits(), load_digits()
    assert data.images.shape == (1347, 64) and data.test_images.shape == (450, 64)
    assert data.images.dtype == np.uint8 and data.images.min() == 0 and data.images.max() == data.ink == 16
    np.testing.assert_array_equal(data.test_images, again.test_images)
    whole = np.bincount(np.concatenate([data.labels, data.test_labels]))
    assert np.abs(np.bincount(data.test_labels) - whole / 4).max() <= 1  # stratified
    rows = {row.tobytes() for row in data.images}
    assert not any(row.tobytes() in rows for row in data.test_images)
    assert data.classes == 10 and data.chance == np.bincount(data.test_labels).max() / 450


@pytest.mark.parametrize("rename", [str, lambda name: name.replace("-idx", ".idx")], ids=["dash", "dot"])
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
def test_idx_round_trip(tmp_path: Path, rename: Callable[[str], str], compress: bool) -> None:
    for name, array in zip(NAMES, arrays(), strict=True):
        content = gzip.compress(idx(array)) if compress else idx(array)
        (tmp_path / (rename(name) + ".gz" * compress)).write_bytes(content)
    data = load_idx(tmp_path)
    assert_holds(data, arrays())
    assert data.pixels == (3, 2) and data.ink == 255 and data.classes == 3 and data.chance == 0.5  # test labels 0 1 2 0


def test_a_gz_name_on_plain_content_is_read(directory: Path) -> None:
    (directory / NAMES[0]).rename(directory / f"{NAMES[0]}.gz")
    assert_holds(load_idx(directory), arrays())


def refuses(message: str, directory: Path) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        load_idx(directory)


def test_not_a_directory(tmp_path: Path) -> None:
    refuses(f"--data: {tmp_path / 'none'} is not there; want a directory of IDX files", tmp_path / "none")
    (tmp_path / "file").touch()
    refuses(f"--data: {tmp_path / 'file'} is not a directory; want a directory of IDX files", tmp_path / "file")


def test_a_directory_without_some_or_any_idx_files(directory: Path, tmp_path: Path) -> None:
    (directory / NAMES[1]).unlink()
    (directory / NAMES[2]).unlink()
    refuses(
        f"--data: no {NAMES[1]}, no {NAMES[2]} in {directory}; each may be plain or .gz, with '.' for the last '-' too",
        directory,
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    refuses(
        f"--data: no {', no '.join(NAMES)} in {empty}; each may be plain or .gz, with '.' for the last '-' too", empty
    )


IMAGES = idx(arrays()[0])  # 7 x 3 x 2: 16 bytes of header, 42 of pixels


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short: 0 bytes, want 16 for the header alone; fetch it again"),
        (IMAGES[:3], "cut short: 3 bytes, want 16 for the header alone; fetch it again"),
        (IMAGES[:15], "cut short: 15 bytes, want 16 for the header alone; fetch it again"),
        (IMAGES[:16], "cut short: 0 bytes after the header, want the 42 bytes of shape 7 x 3 x 2; fetch it again"),
        (IMAGES[:-1], "cut short: 41 bytes after the header, want the 42 bytes of shape 7 x 3 x 2; fetch it again"),
        (IMAGES + b"\0", "too long: 43 bytes after the header, want the 42 bytes of shape 7 x 3 x 2; fetch it again"),
        (b"\x89PNG\r\n\x1a\n", "begins with 89504e47, want 00000803, an IDX file of unsigned bytes with 3 axes"),
        (idx(arrays()[1]), "begins with 00000801, want 00000803, an IDX file of unsigned bytes with 3 axes"),
        (b"\0\0\r" + IMAGES[3:], "begins with 00000d03, want 00000803, an IDX file of unsigned bytes with 3 axes"),
        (b"\0\0\x08\x03" + b"\xff" * 12, f"cut short: 0 bytes after the header, want the {(2**32 - 1) ** 3:,} bytes "
                                         f"of shape "
         "4294967295 x 4294967295 x 4294967295; fetch it again"),
        (gzip.compress(IMAGES[:-1], mtime=0), "cut short: 41 bytes after the header, want the 42 bytes of shape 7 x 3 "
                                              "x 2; fetch it again"),
        (idx(np.zeros((0, 3, 2))), "holds no pixels (shape (0, 3, 2)); want at least one image"),
        (idx(np.zeros((7, 0, 2))), "holds no pixels (shape (7, 0, 2)); want at least one image"),
    ],
)  # fmt: skip
def test_bad_idx_file(directory: Path, content: bytes, message: str) -> None:
    (directory / NAMES[0]).write_bytes(content)
    if "(0, 3, 2)" in message:
        (directory / NAMES[1]).write_bytes(idx(np.zeros(0)))
    refuses(f"{directory / NAMES[0]}: {message}", directory)


@pytest.mark.parametrize("cut", [2, 9, 12, -9, -3])
def test_gzip_cut_short(directory: Path, cut: int) -> None:
    path = directory / NAMES[0]
    path.write_bytes(gzip.compress(IMAGES, mtime=0)[:cut])
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: corrupt gzip file \(.+\); fetch it again$"):
        load_idx(directory)


@pytest.mark.parametrize("at", [2, 15, -6], ids=["method", "data", "checksum"])
def test_gzip_corrupt(directory: Path, at: int) -> None:
    path, content = directory / NAMES[0], bytearray(gzip.compress(IMAGES, mtime=0))
    content[at] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: corrupt gzip file \(.+\); fetch it again$"):
        load_idx(directory)


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=rf"^{re.escape(str(tmp_path / 'none'))}: can't be read: No such file or directory$"
    ):
        read_idx(tmp_path / "none", 3)


def test_files_that_do_not_go_together(directory: Path) -> None:
    (directory / NAMES[3]).write_bytes(idx(np.zeros(5)))
    refuses(f"{directory / NAMES[2]} has 4 images, {NAMES[3]} 5 labels; want as many of each", directory)
    (directory / NAMES[3]).write_bytes(idx(np.zeros(4)))
    (directory / NAMES[2]).write_bytes(idx(np.zeros((4, 2, 3))))
    refuses(
        f"--data: training and test images in {directory} are of 3 x 2 and of 2 x 3 pixels; want one size", directory
    )
