"""The `moments` command: files of any order, axis, byte order and version, in bounded memory; bad files."""

import io
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch import python
from shapes import every_half_backend

import fastbn
from fastbn.arguments import config
from fastbn.cli import main, npy_moments

SHAPE = (5, 6, 7, 3)


def data(dtype="float32", order="C", shape=SHAPE):
    x = np.random.default_rng(1).standard_normal(shape) * np.linspace(1, 3, shape[-1]) + 100
    return np.asarray(x.astype(dtype), order=order)


@pytest.fixture
def npy(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, data())
    return path


def left(tmp_path):
    """Names beside the input; a temporary file would show here."""
    return sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("chunk_bytes", [3, 40, 300, 10**6], ids=["below one value", "below one row", "rows", "whole"])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8"])
def test_every_order_axis_and_chunk(tmp_path, dtype, order, axis, chunk_bytes):
    x = data(dtype, order)
    np.save(tmp_path / "x.npy", x)
    arguments = [
        "moments",
        "x.npy",
        "--axis",
        axis,
        "--save",
        "s.npz",
        "--normalize",
        "y.npy",
        "--chunk-mb",
        chunk_bytes / 1e6,
    ]
    paths = [str(tmp_path / a) if str(a).endswith((".npy", ".npz")) else str(a) for a in arguments]
    assert main(paths) == 0

    wide = np.moveaxis(x.astype(np.float64), axis, 0).reshape(x.shape[axis], -1)
    saved = np.load(tmp_path / "s.npz")
    assert saved["count"] == wide.shape[1]
    assert saved["axis"] == axis % x.ndim
    np.testing.assert_allclose(saved["mean"], wide.mean(1), rtol=1e-6)
    np.testing.assert_allclose(saved["var"], wide.var(1), rtol=1e-6)
    np.testing.assert_allclose(saved["std"], wide.std(1), rtol=1e-6)

    y = np.load(tmp_path / "y.npy")
    assert (y.dtype, y.shape, y.flags.f_contiguous) == (x.dtype, x.shape, x.flags.f_contiguous)
    expected = (wide - wide.mean(1)[:, None]) / np.sqrt(wide.var(1) + 1e-5)[:, None]
    np.testing.assert_allclose(np.moveaxis(y, axis, 0).reshape(expected.shape), expected, atol=5e-6)
    assert left(tmp_path) == ["s.npz", "x.npy", "y.npy"]


@every_half_backend
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f2", ">f2", "bfloat16"])
def test_half_files(tmp_path, dtype, order, backend, capsys, monkeypatch):
    """The statistics, and a copy of the same dtype; of bfloat16 the file keeps two bytes a value and no name."""
    monkeypatch.setattr(config, "BACKEND", backend)
    x = data(dtype, order)
    np.save(tmp_path / "x.npy", x)
    paths = [str(tmp_path / name) for name in ("x.npy", "s.npz", "y.npy")]
    option = ["--bfloat16"] if dtype == "bfloat16" else []
    assert (
        main(["moments", paths[0], "--save", paths[1], "--normalize", paths[2], "--chunk-mb", "0.0003", *option]) == 0
    )
    assert f"{np.dtype(dtype).name}, shape (5, 6, 7, 3), 1,260 bytes" in capsys.readouterr().out

    m = fastbn.moments(x)
    saved = np.load(paths[1])
    np.testing.assert_allclose(saved["mean"], m.mean, rtol=1e-6)
    np.testing.assert_allclose(saved["var"], m.var(), rtol=1e-6)
    y = np.load(paths[2])
    assert (y.dtype.str, y.shape, y.flags.f_contiguous) == (np.load(paths[0]).dtype.str, x.shape, x.flags.f_contiguous)
    native = x.dtype.newbyteorder("=")
    want = fastbn.batch_norm_inference(x.astype(native), saved["mean"], saved["var"])
    np.testing.assert_array_equal(y.view(x.dtype).astype(native), want)


@pytest.mark.parametrize("chunk_bytes", [3, 300, 10**6], ids=["below one row", "rows", "whole"])
@pytest.mark.parametrize("dtype", ["uint8", "int8", ">u2", "int16"])
def test_integer_files(tmp_path, dtype, chunk_bytes, capsys):
    """Exact statistics; a normalized copy has no dtype to be of, and is refused before any work."""
    x = np.random.default_rng(2).integers(0, 127, SHAPE, endpoint=True).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    command = ["moments", str(tmp_path / "x.npy"), "--chunk-mb", str(chunk_bytes / 1e6)]
    assert main([*command, "--save", str(tmp_path / "s.npz")]) == 0
    saved, wide = np.load(tmp_path / "s.npz"), x.astype(np.float64)
    np.testing.assert_allclose(saved["mean"], wide.mean((0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(saved["var"], wide.var((0, 2, 3)), rtol=1e-13)
    assert main([*command, "--normalize", str(tmp_path / "y.npy")]) == 2
    assert (
        f"holds {np.dtype(dtype)}, a copy to be normalized wants float16, bfloat16, float32 or float64"
    ) in capsys.readouterr().err
    assert left(tmp_path) == ["s.npz", "x.npy"]


def test_bfloat16_is_asked_for_and_only_for_what_may_be_it(tmp_path, capsys, monkeypatch):
    path = str(tmp_path / "x.npy")
    for dtype in ("float32", "float16", "int16"):
        np.save(path, np.ones((2, 3), dtype))
        assert main(["moments", path, "--bfloat16"]) == 2
        assert (
            f"holds {dtype}, not bfloat16, which numpy.save writes as |V2: leave out --bfloat16"
            in capsys.readouterr().err
        )
    np.save(path, np.ones((2, 3), "bfloat16"))
    assert main(["moments", path]) == 2
    said = capsys.readouterr().err
    assert "holds |V2, two bytes a value without a type: if they are bfloat16, add --bfloat16" in said
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert main(["moments", path, "--bfloat16"]) == 2
    assert capsys.readouterr().err == "fastbn: bfloat16 needs ml_dtypes: pip install 'fastbn[bfloat16]'\n"


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.data(), st.integers(1, 5000))
def test_chunks_are_consecutive_and_hold_the_channels_they_say(shape, draw, limit):
    axis = draw.draw(st.integers(0, len(shape) - 1))
    npy = npy_moments.Npy(Path("x"), np.dtype("f8"), tuple(shape), tuple(shape), axis, 0)
    channel = np.indices(shape)[axis].ravel()
    position = 0
    for dims, first in npy_moments._chunks(npy, limit):
        size = math.prod(dims)
        assert size == 1 or size * 8 <= limit
        expected = np.broadcast_to(
            np.arange(first, first + dims[axis]).reshape([-1 if a == axis else 1 for a in range(len(dims))]), dims
        )
        np.testing.assert_array_equal(channel[position : position + size], expected.ravel())
        position += size
    assert position == math.prod(shape)


def test_a_chunked_mean_at_a_large_offset_is_exact_enough(tmp_path):
    x = np.random.default_rng(0).standard_normal((4000, 3), np.float32) + np.float32(1e6)
    np.save(tmp_path / "x.npy", x)
    m = npy_moments.file_moments(npy_moments.open_npy(tmp_path / "x.npy", 1), 1000, lambda done: None)
    np.testing.assert_allclose(m.mean, x.mean(0, np.float64), rtol=1e-9)
    np.testing.assert_allclose(m.var(), x.var(0, np.float64), rtol=1e-6)


def test_nan_and_inf_stay_in_their_channel(tmp_path, capsys):
    x = data(shape=(50, 3))
    x[7, 0], x[8, 1] = np.nan, np.inf
    np.save(tmp_path / "x.npy", x)
    assert main(["moments", str(tmp_path / "x.npy"), "--chunk-mb", "0.0001", "--save", str(tmp_path / "s.npz")]) == 0
    saved = np.load(tmp_path / "s.npz")
    assert np.isnan(saved["mean"][0])
    assert not np.isfinite(saved["mean"][1])
    assert np.isfinite(saved["std"][2])
    assert "2 channels hold NaN or infinite values" in capsys.readouterr().err


def test_the_printed_table(npy, capsys):
    assert main(["moments", str(npy)]) == 0
    out = capsys.readouterr().out
    assert "float32, shape (5, 6, 7, 3), 2,520 bytes" in out
    assert "channel axis 1: 6 channels of 105 values" in out
    m = fastbn.moments(data())
    rows = [line.split() for line in out.splitlines() if line[:1].isdigit()]
    expected = np.stack([np.arange(6), m.mean, m.std()], 1)
    np.testing.assert_allclose(np.array(rows, float), expected, rtol=1e-8)


def test_many_channels_are_shortened(tmp_path, capsys):
    np.save(tmp_path / "x.npy", data(shape=(4, 100)))
    assert main(["moments", str(tmp_path / "x.npy")]) == 0
    out = capsys.readouterr().out
    assert "80 channels in between are left out; --save OUT.npz keeps them all" in out
    rows = [line.split()[0] for line in out.splitlines() if len(line.split()) == 3]
    assert rows == ["channel", "-" * 7, *map(str, range(10)), "...", *map(str, range(90, 100))]


MEASURE = """
import resource, sys
from fastbn.cli import main
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
main(["moments", sys.argv[1]])
before = peak()
main(["moments", sys.argv[2], "--chunk-mb", "16", "--axis", sys.argv[3]])
print("grown", peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no getrusage to measure with")
@pytest.mark.parametrize("axis", [0, 1])
def test_memory_is_bounded_by_the_chunk(npy, tmp_path, axis):
    shape = (4, 300, 250, 250)  # 300 MB, a hole in the file system
    with (tmp_path / "big.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + 4 * math.prod(shape))
    said = python("-c", MEASURE, str(npy), str(tmp_path / "big.npy"), str(axis), NUMBA_DISABLE_JIT="0")
    assert "75,000,000 bytes" not in said
    assert "300,000,000 bytes" in said
    assert int(said.split("grown")[1]) < 40e6


def _bytes(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def _written(array, version):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, that older readers don't know the version
        np.lib.format.write_array(file, array, version)
    return file.getvalue()


HEADER = _bytes(data())[:128]
BAD = {
    "cut short in the data": (
        _bytes(data())[:-1],
        "cut short: the header promises float32 of shape (5, 6, 7, 3), 1 bytes more",
    ),
    "cut short in the header": (HEADER[:50], "damaged .npy header"),
    "cut short in the magic": (HEADER[:5], "damaged .npy header"),
    "empty": (b"", "is not a .npy file"),
    "text": (b"1,2,3\n4,5,6\n", "is not a .npy file"),
    "an archive": (b"PK\x03\x04" + bytes(100), "is an .npz archive, want a .npy file"),
    "a header of nonsense": (HEADER.replace(b"'shape'", b"'shale'"), "damaged .npy header"),
    "a header that can't be parsed": (HEADER.replace(b"{", b"("), "damaged .npy header"),
    "a format to come": (HEADER.replace(b"NUMPY\x01", b"NUMPY\x07"), "is of .npy format 7.0, want 1.0, 2.0 or 3.0"),
    "an endless header": (b"\x93NUMPY\x03\0\xff\xff\xff\xff{" + b" " * 2**20, "damaged .npy header"),
    "a header of more than NumPy takes": (
        b"\x93NUMPY\x02\0\0\x80\0\0" + HEADER[10:-1] + b" " * 2**15,
        "damaged .npy header",
    ),
    "fields with names in UTF-8": (
        _written(np.zeros((2, 2), [("\u2026", "f4")]), (3, 0)),
        "want float16, bfloat16, float32 or float64",
    ),
    "a negative shape": (HEADER.replace(b"(5, 6", b"(5,-6") + bytes(2520), "cut short"),
    "a gigantic shape": (HEADER.replace(b"(5, 6, 7, 3), }     ", b"(99999999999999, 6)}"), "cut short"),
    "integers": (_bytes(np.ones((2, 3), np.int32)), "holds int32, want float16, bfloat16, float32 or float64"),
    "complex": (_bytes(np.ones((2, 3), np.complex64)), "holds complex64, want float16, bfloat16, float32 or float64"),
    "strings": (_bytes(np.array([["a", "b"]])), "holds <U1, want float16, bfloat16, float32 or float64"),
    "objects": (
        _bytes(np.array([[None, 1]]), allow_pickle=True),
        "holds object, want float16, bfloat16, float32 or float64",
    ),
    "records": (_bytes(np.zeros((2, 2), "f4,i4")), "want float16, bfloat16, float32 or float64"),
    "one axis": (_bytes(np.ones(3, np.float32)), "want rank 2 or more"),
    "a scalar": (_bytes(np.float32(1)), "want rank 2 or more"),
    "no channels": (_bytes(np.ones((3, 0), np.float32)), "with no channels"),
    "no values": (_bytes(np.ones((0, 3), np.float32)), "holds no values"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, tmp_path, capsys):
    content, message = BAD[name]
    (tmp_path / "x.npy").write_bytes(content)
    assert (
        main(
            [
                "moments",
                str(tmp_path / "x.npy"),
                "--save",
                str(tmp_path / "s.npz"),
                "--normalize",
                str(tmp_path / "y.npy"),
            ]
        )
        == 2
    )
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("fastbn: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert left(tmp_path) == ["x.npy"]


def test_an_axis_out_of_range(npy, capsys):
    assert main(["moments", str(npy), "--axis", "4"]) == 2
    assert "axis: given 4, want one from -4 to 3" in capsys.readouterr().err


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_format(version, npy, tmp_path):
    (tmp_path / "z.npy").write_bytes(_written(data(), version))
    for name in ("x", "z"):
        assert main(["moments", str(tmp_path / f"{name}.npy"), "--normalize", str(tmp_path / f"{name}.y.npy")]) == 0
    np.testing.assert_array_equal(*(np.load(tmp_path / f"{name}.y.npy") for name in ("x", "z")))


def test_what_comes_after_the_first_array_is_not_passed_over_in_silence(npy, capsys):
    with npy.open("ab") as file:
        np.save(file, data() + 1)
    assert main(["moments", str(npy)]) == 0
    assert capsys.readouterr().err == f"{npy}: 2,648 bytes after the first array are not read\n"


def test_an_eps_of_zero_divides_a_constant_channel_by_zero_and_says_so(tmp_path, capsys):
    x = data(shape=(50, 3))
    x[:, 1] = 7
    np.save(tmp_path / "x.npy", x)
    assert main(["moments", str(tmp_path / "x.npy"), "--normalize", str(tmp_path / "y.npy"), "--eps", "0"]) == 0
    assert capsys.readouterr().err == "1 channels have variance 0: with --eps 0 their copy is NaN\n"
    y = np.load(tmp_path / "y.npy")
    np.testing.assert_array_equal(np.isnan(y).all(0), [False, True, False])
    np.testing.assert_allclose(y[:, ::2].std(0), 1, rtol=1e-6)


def test_without_rich_the_remedy_is_named(npy, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["moments", str(npy)]) == 2
    assert "pip install 'fastbn[demo]'" in capsys.readouterr().err
