"""The data contracts: labels, prepared data sets, predictions, histories; sources of images."""
