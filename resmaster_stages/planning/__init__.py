"""Before anything runs: reads the input, and tells what a run would do and cost."""
