"""The kernel contract.

Shapes
    `channels_first` kernels take (N, C, S) arrays, S contiguous; `channels_last` kernels take (R, C) arrays, C contiguous. The other
    strides are free, negative and zero ones too. x, dy and y are of one dtype, float32 or float64; inputs may be read-only and unaligned.
Allocation
    Kernels never allocate. Outputs, statistics (float64, shape (C,)) and workspaces come from `fastbn.backends.cpu`.
Arithmetic
    In the dtype of x within a block of at most a few thousand values; blocks are merged in float64. Means are split into a value of the
    dtype of x and the remainder.
Determinism
    Blocks and parts come from the shape (`fastbn.backends.schedule`), never from the number of threads, and are merged in order: the
    same input gives the same bits on any number of threads. A kernel's serial and parallel forms are one body compiled twice; which one
    runs is the schedule's choice, and where threads are limited to one or unsafe (`fastbn.pool`) always the serial one.
Errors
    None: arguments were checked before. NaN and Inf propagate.
Specializations
    One per kernel, dtype of x and form, serial or parallel, compiled at its first call and kept on disk (`fastbn.kernels._cache`); the
    forward and backward of an array need two, or four. Read-only, unaligned or odd-strided arrays convert to it and never trigger another.
"""
