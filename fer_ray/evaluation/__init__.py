"""`jobs/evaluate.py`: predictions to scores, comparisons and a report."""
