"""Images and results on disk: sources, prepared datasets, predictions, run folders."""
