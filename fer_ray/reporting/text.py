"""Text of reports: numbers as they are written, aligned tables, spaces that do not break."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_TOGETHER = re.compile(r" (?=[=<] )|(?<=[=<]) | (?=%)|(?<=%) (?=interval)|(?<=\d) (?=points|to|M )")


def keep_together(text: str) -> str:
    """Makes the spaces inside ``n = 3``, ``95 %`` or ``0.4 points`` unbreakable."""
    return _TOGETHER.sub("\u00a0", text)


def percent(fraction: float | None) -> str:
    """A fraction in percent without the sign, such as ``55.1``; a dash for None and NaN."""
    return "–" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.1f}"


def p_value(value: float | None) -> str:
    """A p-value as ``0.012`` or ``< 0.001``; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def p_equals(value: float) -> str:
    """A p-value for a sentence, as ``p = 0.012`` or ``p < 0.001``."""
    text = p_value(value)
    return f"p {text}" if value < 0.001 else f"p = {text}"


def aligned(rows: Sequence[Sequence[str]], num_texts: int = 2) -> list[str]:
    """Lines with columns of equal width.

    Args:
        rows: the cells, each row as long as the first.
        num_texts: number of first columns that are aligned to the left; the others are numbers,
            aligned to the right.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < num_texts else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
