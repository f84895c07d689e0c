"""Faults around a run: requests to stop, lost ranks, hangs, restarts, its status."""
