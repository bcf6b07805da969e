"""Parts of `bench_step.py` and `bench_peers.py`: what is run, on what, how it is written down."""
