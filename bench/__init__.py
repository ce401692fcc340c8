"""Benchmarks: `python -m bench.peers`, and resnet, gpu, dask, ideas alike; asv's are in bench/suite/."""
