"""Types of sources, one module each; `fer_ray.data.image_source` registers and opens them.

Importing this package loads none of them.
"""

from __future__ import annotations

from fer_ray.data.sources.files import NOT_FOUND, Entry, FileSource, ReadError, list_files

__all__ = ["NOT_FOUND", "Entry", "FileSource", "ReadError", "list_files"]
