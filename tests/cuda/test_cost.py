"""The bytes that the GPU's kernels move, for shapes on paper, and how `explain` says it."""

import pytest

import fastbn
from fastbn.cuda import cost, grids

DIMS = [(32, 64, 3136), (32, 512, 49), (65536, 64), (128, 3), (4, 8, 655360)]


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("float64", 8), ("float16", 2), ("bfloat16", 2)])
def test_each_pass_moves_its_arrays_as_often_as_its_kernels_read_and_write_them(
    dims: tuple[int, ...], dtype: str, itemsize: int
) -> None:
    array = itemsize
    for n in dims:
        array *= n
    small = dims == (128, 3)  # which one launch reads once
    times = {"moments": 1, "inference": 2, "forward": 2 if small else 3, "backward": 3 if small else 5}
    assert {name: cost.moved(name, dims, dtype) for name in times} == {name: n * array for name, n in times.items()}
    for name in times:
        each = cost.launches(name, dims, dtype)
        assert len(each) <= 3
        assert all(0 < launch.blocks < 2**31 for launch in each)
        fused = small and name in ("forward", "backward")
        assert [launch.kernel.startswith("finish.") for launch in each].count(True) == (not fused)
        assert not fused or [launch.kernel for launch in each] == [f"fused.{name}_columns"]


def test_arrays_of_more_than_2_31_values_take_the_long_kernels() -> None:
    for name in ("forward", "backward", "inference"):
        assert cost.launches(name, (2**10, 2**12, 2**10), "float32")[-1].kernel.endswith("_long")
        assert not cost.launches(name, (2**10, 2**12, 2**8), "float32")[-1].kernel.endswith("_long")


def test_short_rows_and_channels_last_are_columns() -> None:
    assert cost.launches("moments", (32, 64, grids.SHORT), "float32")[0].kernel == "columns.moments_columns"
    assert cost.launches("moments", (32, 64, grids.SHORT + 1), "float32")[0].kernel == "rows.moments_rows"
    assert cost.launches("backward", (4096, 256), "float32")[0].kernel == "columns.sums_columns"


def test_one_launch_takes_what_a_block_can_keep_in_cache() -> None:
    def names(name: str, *dims: int) -> list[str]:
        return [launch.kernel for launch in cost.launches(name, dims, "float32")]

    assert names("forward", 2, 16, 64) == ["fused.forward_rows"]
    assert names("backward", 1, 64, 49) == ["fused.backward_rows"]
    assert names("forward", 16, 2048, 14 * 14) == ["fused.forward_rows"]
    assert names("forward", 32, 64) == ["fused.forward_columns"]
    for large in ((256, 2048, 14 * 14), (32, 64, 56 * 56), (32, 512, 49), (4096, 64)):
        assert len(names("forward", *large)) == len(names("backward", *large)) == 3


def test_explain_says_it_without_a_gpu() -> None:
    text = fastbn.explain((32, 64, 56, 56), "float32", backend="cuda").text
    assert (
        "forward: rows.moments_rows (768 blocks), finish.finish_forward (4 blocks), apply.normalize (1568 blocks)"
    ) in text
    assert f"moves 77.07 MB, {77.070336 / 3350 * 1e3:.4g} us at 3350 GB/s" in text
    assert "backend: cuda (requested" in text
    assert "cpu: available" in text
    assert "nothing to do" in fastbn.explain((0, 64, 56, 56), "float32", backend="cuda").text
