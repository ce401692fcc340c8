"""The kernel contract.

Shapes
    Kernels on rows take (N, C, S) arrays, S contiguous; kernels on columns take (R, F) arrays, F contiguous: channels
    last, and channels first with short rows, S columns of which share a channel. The other strides are free, negative
    and zero ones too. x, dy and y are of one dtype: float32, float64, or half precision as its bits (uint16: float16,
    int16: bfloat16); inputs may be read-only and unaligned. Parameters are of float32, beside float64 of float64.
    `print(kernel)` says what each argument is.
Allocation
    Kernels never allocate. Outputs, statistics (float64, shape (C,)) and workspaces come from `fastbn.cpu.passes`.
Arithmetic
    In float32, beside float64 in float64, within a block of at most a few thousand values; blocks are merged in
    float64. Means are split into a value of that dtype and the remainder. Half precision is rounded once, to nearest
    even, when a result is stored.
Determinism
    Blocks and parts come from the shape (`fastbn.cpu.schedule`), never from the number of threads, and are merged in
    order: the same input gives the same bits on any number of threads. A kernel's serial and parallel forms are one
    body compiled twice.
Errors
    None: arguments were checked before. NaN and Inf propagate. A kernel's compiled form is called by its entry point,
    which does not look at types: an array of another rank or dtype would be read as if it were of the right one.
Specializations
    Each `Kernel` has one for each dtype of x (float16, bfloat16, float32, float64), serial and parallel, compiled at
    its first call and cached on disk: `moments`, `normalize`, `forward`, `grad_reduce`, `grad_input` and `backward`,
    each on rows (`rows`, `rows_backward`) and on columns (`columns`, `columns_apply`, `columns_backward`);
    `inference.rows` and `inference.columns`, which take addresses; and serial `elementwise.rstd` and
    `elementwise.track`. Read-only, unaligned and odd-strided arrays run in the same; nothing triggers another. A first
    forward and backward take three, or five where each is two kernels.
"""
