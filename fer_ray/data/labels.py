"""The names of classes and splits.

Labels are a property of each prepared data set; the constants here are FER-2013's and serve
as the default of the synthetic source.
"""

from __future__ import annotations

FER2013_LABELS = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
"""FER-2013's seven expressions, alphabetical: the order of every ``prob_<label>`` column."""

SPLITS = ("train", "validation", "test")
"""The splits that a prepared data set can have."""

UNKNOWN_LABEL = -1
"""The label's index of an image whose label is not known (null in Parquet)."""


def probability_column(label: str) -> str:
    """The name of the predictions' column that holds a label's probability."""
    return f"prob_{label}"
