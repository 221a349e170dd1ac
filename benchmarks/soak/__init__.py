"""Builds that are killed, stopped and failed at random, many times; each result must be that of an undisturbed build.

`python -m benchmarks.soak --help` tells its scenes and options; `docs/scale.md` tells what it found.
"""
