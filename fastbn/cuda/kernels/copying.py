"""Copies between memory orders on the GPU, for arrays that two strides can't describe."""

from fastbn.cuda.kernels.gpu import gpu
from fastbn.cuda.kernels.jit import kernel
from fastbn.cuda.kernels.merging import grid_index

RANK = 6


@kernel(
    x="x input, of any strides",
    y="x result, of any strides",
    **dict.fromkeys("abcdef", "i8 length of an axis"),
    **dict.fromkeys(("xa", "xb", "xc", "xd", "xe", "xf"), "i8 stride of x, in elements"),
    **dict.fromkeys(("ya", "yb", "yc", "yd", "ye", "yf"), "i8 stride of y, in elements"),
)
def move(x, y, a, b, c, d, e, f, xa, xb, xc, xd, xe, xf, ya, yb, yc, yd, ye, yf):
    """y = x, element by element of shape (a, b, c, d, e, f), with the strides of both; a float is kept as it is."""
    left = grid_index()
    if left >= a * b * c * d * e * f:
        return
    left, k = gpu.quotient(left, f), left
    k -= left * f
    i, j = k * xf, k * yf
    left, k = gpu.quotient(left, e), left
    k -= left * e
    i, j = i + k * xe, j + k * ye
    left, k = gpu.quotient(left, d), left
    k -= left * d
    i, j = i + k * xd, j + k * yd
    left, k = gpu.quotient(left, c), left
    k -= left * c
    i, j = i + k * xc, j + k * yc
    left, k = gpu.quotient(left, b), left
    k -= left * b
    gpu.store(y, j + k * yb + left * ya, gpu.load(x, i + k * xb + left * xa))
