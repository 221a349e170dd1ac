"""Everything that this project wants to know of a GPU, in one command: `python -m benchmarks.gpu`. See docs/gpu.md."""
