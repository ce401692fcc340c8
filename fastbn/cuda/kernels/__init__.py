"""The GPU kernels, in `numba.cuda`. Nothing here is imported before a CUDA array or the backend is asked for.

Every kernel takes pointers, sizes and strides in elements, and writes into memory of its caller; none allocates. `gpu`
is what kernels are written in: loads, stores, vectors of 16 bytes, shared memory. It has two forms, LLVM instructions
and plain Python for the simulator. Statistics that blocks share are merged in an order that the shape alone decides, so
that every run gives the same bits.
"""
