"""Benchmarks: `python -m bench.peers`, and resnet, gpu, dask alike; asv's are in bench/suite/."""
