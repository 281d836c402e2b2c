"""`jobs/predict.py`: batch inference on Ray Data."""
