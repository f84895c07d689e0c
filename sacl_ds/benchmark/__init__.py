"""The training step beside open_clip's: what tools/benchmark_step.py measures."""
