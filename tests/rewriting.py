"""Files that tests change on purpose, with the hashes that make them believed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from fer_ray.data import dataset
from fer_ray.data.integrity import FileRecord, with_hash


def part(file: Path) -> dict[str, Any]:
    """What ``dataset.json`` records about a part, from the file that is there now."""
    record = FileRecord.of(file.read_bytes())
    return dataset.Part(**vars(record), rows=pq.read_metadata(file).num_rows).to_dict()


def describe_again(folder: Path, **changes: Any) -> None:
    """Writes ``dataset.json`` for the parts that are there now, with some other values."""
    value = json.loads((folder / dataset.INFO_NAME).read_text())
    for split in value["splits"].values():
        split["parts"] = {file: part(folder / file) for file in split["files"]}
        split["rows"] = sum(described["rows"] for described in split["parts"].values())
    dataset.write_info(str(folder), value | changes)


def hash_again(path: Path, **changes: Any) -> None:
    """Changes values of a JSON file and gives it the hash of its new content."""
    path.write_text(json.dumps(with_hash(json.loads(path.read_text()) | changes)))


NO_JSON_OBJECTS = {
    "empty": b"",
    "cut": b'{"format": 2, "labels": ["hap',
    "a list": b"[]",
    "an empty object": b"{}",
    "not UTF-8": b"\xff\xfe",
    "nested deep": b'{"format":' * 10_000 + b"2" + b"}" * 10_000,
    "a lone surrogate": b'{"format": 2, "labels": ["\\ud800"]}',
    "not a number": b'{"format": 2, "pixel_mean": NaN}',
    "a number of 5,000 digits": b'{"format": ' + b"9" * 5_000 + b"}",
}
"""Contents that are no JSON, or no object with a format."""
