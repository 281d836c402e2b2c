"""`jobs/prepare.py`: from any source of images to a prepared dataset."""
