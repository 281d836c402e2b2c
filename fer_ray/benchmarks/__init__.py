"""`jobs/benchmark.py`: speed as ratios to named alternatives, and the recorded results."""
