"""`jobs/train.py`: data-parallel training on Ray."""
