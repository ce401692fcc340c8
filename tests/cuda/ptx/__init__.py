"""fastbn's CUDA kernels, executed on the CPU from the PTX that the compiler makes of them, with every access checked.

`parser` reads PTX, `machine` runs it over `memory` that knows its elements, with `instructions`, `arithmetic` and
`bits`. `driver` stands where a driver would for fastbn's own host code; `arrays` are what calls are given, `cases`
which calls, `checks` what they must give, `planted` what the machine must see. `python -m tests.cuda.ptx.run` runs the
whole product, `test_executed` a covering set of it.

It shows that what is compiled computes the right numbers, reads and writes elements only, waits where it must and
leaves nothing undefined. It doesn't show what the driver, ptxas and a device make of it: `approx` instructions are
exact here, a multiplication and an addition that ptxas may contract are two roundings, and fma rounds twice in rare
cases.
"""
