"""Distributed training and evaluation of facial-expression models on Ray."""

__version__ = "0.1.0"
