"""The report of a run: one HTML file that needs nothing else, its pictures as PNG, its numbers as JSON."""
