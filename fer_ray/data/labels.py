"""The names of classes and splits.

Each prepared dataset has labels of its own. The labels here are those of FER-2013, which the
synthetic source uses too.
"""

from __future__ import annotations

FER2013_LABELS = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
"""FER-2013's seven expressions in alphabetical order, as in every prepared dataset."""

SPLITS = ("train", "validation", "test")
"""The splits that a prepared dataset can have."""

UNKNOWN_LABEL = -1
"""Label index of an image without a label (null in Parquet)."""


def probability_column(label: str) -> str:
    """Returns the name of the prediction column with a label's probability."""
    return f"prob_{label}"
