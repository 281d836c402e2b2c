"""Tables of paths and labels, and FER-2013's own file of pixels."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fer_ray.data import image_source, sources
from fer_ray.data.sources import kaggle, pixels, tables
from fer_ray.errors import UserError

# ------------------------------------------------------------------ paths and labels


def open_source(source: str) -> image_source.ImageSource:
    source_type = image_source.SOURCES[image_source.find_type(source)]
    return source_type.open(source, image_source.SourceOptions())


def by_path(source) -> dict[str, tuple[str | None, str | None, str | None]]:
    return {entry.path: (entry.split, entry.label, entry.reason) for entry in source.entries()}


def table_source(path: Path) -> tables.TableImageSource:
    return tables.TableImageSource(str(path), path.name)


def write_table(path: Path, frame: pd.DataFrame) -> tables.TableImageSource:
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    return table_source(path)


@pytest.mark.parametrize("name", ["faces.csv", "faces.parquet"])
def test_rows_become_entries_or_say_why_not(name, tmp_path):
    frame = pd.DataFrame(
        [
            ("a/1.jpg", "happy", "train"),
            ("a/2.jpg", "sad", "Val"),
            ("a/3.jpg", None, "test"),
            ("a/4.jpg", None, "train"),
            ("a/5.jpg", "sad", "holdout"),
            (None, "sad", "train"),
            ("a/7, é.jpg", "sad", None),
        ],
        columns=["path", "Label ", "split"],
    )
    assert by_path(write_table(tmp_path / name, frame)) == {
        "a/1.jpg": ("train", "happy", None),
        "a/2.jpg": ("validation", "sad", None),
        "a/3.jpg": ("test", None, None),
        "a/4.jpg": (None, None, "it has no label"),
        "a/5.jpg": (None, None, "its split is 'holdout': not train, validation or test"),
        "row 6": (None, None, "the row has no path"),
        "a/7, é.jpg": (None, None, "its split is '': not train, validation or test"),
    }


def test_numbers_are_labels_too_and_gaps_do_not_make_them_fractions(tmp_path):
    frame = pd.DataFrame({"path": ["1.jpg", "2.jpg", "3.jpg"], "label": [0, 3, None]})
    for name in ("faces.csv", "faces.parquet"):
        source = write_table(tmp_path / name, frame)
        assert not source.has_splits
        labels = {path: label for path, (_, label, _) in by_path(source).items()}
        assert labels == {"1.jpg": "0", "2.jpg": "3", "3.jpg": None}


def test_images_are_read_relative_to_the_table_and_by_absolute_paths(tmp_path):
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "1.jpg").write_bytes(b"one")
    source = table_source(tmp_path / "faces.csv")
    (tmp_path / "faces.csv").write_text("path,label\n")
    source = pickle.loads(pickle.dumps(source))
    absolute = str(tmp_path / "faces" / "1.jpg")
    for path in ("faces/1.jpg", absolute, f"file://{absolute}"):
        assert source.read(path) == b"one"
    for path in ("faces/2.jpg", "nowhere://x/1.jpg", "faces"):
        with pytest.raises(sources.ReadError, match="cannot be read"):
            source.read(path)
    (tmp_path / "faces.csv").unlink()
    with pytest.raises(UserError, match="no longer exists"):
        source.read("faces/2.jpg")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"name,class\nx,y\n", "columns name, class: expected path and label"),
        ("a.csv", b"", r"\(none\): expected path and label"),
        ("a.parquet", b"PAR1 this is none", "cannot be read"),
        (
            "a.txt",
            b"path,label\n",
            "is not a known type of source; expected: .*a .csv or .parquet table",
        ),
        ("a.csv", "path,label\n1.png,a\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
    ],
)
def test_an_unusable_table_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(tmp_path / name))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ fer2013.csv

SQUARE = " ".join(str(tone) for tone in range(16))


def pixel_rows(tmp_path: Path, *lines: str, header: str = "emotion,pixels,Usage"):
    path = tmp_path / "fer2013.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    found = open_source(str(path))
    assert isinstance(found, pixels.PixelImageSource)
    return pickle.loads(pickle.dumps(found))


def test_codes_and_usages_are_mapped_by_name(tmp_path):
    codes = [f"{code},{SQUARE},Training" for code in range(7)]
    rows = pixel_rows(tmp_path, *codes, f"3,{SQUARE},PublicTest", f"4,{SQUARE},PrivateTest")
    entries = list(rows.entries())
    assert [entry.label for entry in entries[:7]] == [
        *("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
    ]
    assert [entry.split for entry in entries[-3:]] == ["train", "validation", "test"]
    assert [entry.path for entry in entries[:2]] == ["line-0000002", "line-0000003"]
    for entry in entries:
        assert np.array_equal(rows.grey(entry.path, entry.at), np.arange(16).reshape(4, 4))


def test_the_competition_s_copy_has_its_columns_in_another_order(tmp_path):
    rows = pixel_rows(tmp_path, f"3, Training,{SQUARE}", header="emotion, Usage, pixels")
    (entry,) = rows.entries()
    assert (entry.split, entry.label) == ("train", "happy")
    assert rows.grey(entry.path, entry.at).shape == (4, 4)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quotes_blank_lines_and_line_ends_do_not_move_the_rows(tmp_path, end):
    path = tmp_path / "fer2013.csv"
    lines = ["emotion,pixels,Usage", f'0,"{SQUARE}",Training', "", f"1,{SQUARE},Training"]
    path.write_bytes(end.join(lines).encode())
    rows = pixels.PixelImageSource(str(path), "")
    entries = list(rows.entries())
    assert [entry.path for entry in entries] == ["line-0000002", "line-0000004"]
    assert all(np.array_equal(rows.grey(o.path, o.at).ravel(), range(16)) for o in entries)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"7,{SQUARE},Training", "emotion '7' is not 0 to 6"),
        (f"x,{SQUARE},Training", "emotion 'x' is not 0 to 6"),
        (f",{SQUARE},Training", "emotion '' is not 0 to 6"),
        (f"0,{SQUARE},Test", "Usage 'Test' is not Training"),
        (f"0,{SQUARE}", "2 columns instead of 3"),
        ("0", "1 columns instead of 3"),
        (f'0,"{SQUARE},Training', "0 columns instead of 3"),
        ("0,1 2 3,Training", "3 pixels are not a square"),
        ("0,,Training", "0 pixels are not a square"),
        ("0,1 2 3 x,Training", "a pixel is 'x': not a whole number"),
        ("0,1 2 3 -4,Training", "a pixel is '-4': not a whole number"),
        ("0,1 2 3 4.5,Training", "a pixel is '4.5': not a whole number"),
        ("0,1 2 3 ٣,Training", "a pixel is '٣': not a whole number"),
        ("0,1 2 3 256,Training", "a pixel is 256: larger than 255"),
        ("0,1 2 3 99999999999999999999999,Training", "a pixel is 99999999999999999999: larger"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(tmp_path, line, message):
    rows = pixel_rows(tmp_path, f"0,{SQUARE},Training", line)
    good, bad = rows.entries()
    assert good.reason is None
    if bad.reason is None:
        with pytest.raises(sources.ReadError) as caught:
            rows.grey(bad.path, bad.at)
        assert message in str(caught.value)
    else:
        assert message in bad.reason


def test_an_unlabelled_row_of_the_test_split_is_kept(tmp_path):
    (entry,) = pixel_rows(tmp_path, f",{SQUARE},PrivateTest").entries()
    assert (entry.split, entry.label, entry.reason) == ("test", None, None)


def test_a_line_without_end_is_refused_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "_MAX_LINE", 1000)
    monkeypatch.setattr(pixels, "_BLOCK", 64)
    long = "1 " * 5000
    rows = pixel_rows(tmp_path, f"0,{long},Training", f"1,{SQUARE},Training")
    first, second = rows.entries()
    assert first.reason == f"the line is too long: {len(long) + 11:,} bytes"
    assert np.array_equal(rows.grey(second.path, second.at).ravel(), range(16))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_after_the_header_are_rows_or_reasons(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("csv") / "fer2013.csv"
    path.write_bytes(b"emotion,pixels,Usage\n" + content)
    rows = pixels.PixelImageSource(str(path), "")
    entries = list(rows.entries())
    assert len(entries) == sum(bool(line.strip()) for line in content.split(b"\n"))
    for entry in entries:
        if entry.reason is None:
            try:
                rows.grey(entry.path, entry.at)
            except sources.ReadError as error:
                assert str(error)


@given(st.integers(1, 12), st.randoms(use_true_random=False))
def test_pixels_read_back(side, random):
    grey = np.array([random.randint(0, 255) for _ in range(side * side)], np.uint8)
    stream = io.StringIO()
    np.savetxt(stream, grey[None], fmt="%d")
    assert np.array_equal(pixels.parse_pixels(stream.getvalue()), grey.reshape(side, side))


# ------------------------------------------------------------------ Kaggle


def test_without_a_network_the_message_says_what_to_download(monkeypatch):
    import kagglehub

    def fail(handle: str) -> str:
        assert handle == kaggle.HANDLE
        raise OSError("Network is unreachable\nand more")

    monkeypatch.setattr(kagglehub, "dataset_download", fail)
    with pytest.raises(UserError, match="on a machine with a network and give the zip") as caught:
        open_source("kaggle")
    assert "\n" not in str(caught.value)


def test_a_download_from_kaggle_is_read_as_a_folder(tmp_path, monkeypatch):
    import kagglehub

    for path in ("images/train/sad/1.jpg", "images/train/happy/2.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    monkeypatch.setattr(kagglehub, "dataset_download", lambda handle: str(tmp_path))
    found = open_source("kaggle")
    assert {(entry.path, entry.label) for entry in found.entries()} == {
        ("images/train/sad/1.jpg", "sad"),
        ("images/train/happy/2.jpg", "happy"),
    }
    assert found.describe(iter(()))["path"] == "kaggle"


def test_rows_that_do_not_fit_the_header_say_so_and_lose_nothing(tmp_path):
    path = tmp_path / "faces.csv"
    path.write_text("path,label\n1.png,v1.0\na,b.png,sad\n2.png,7.0\n" + "x" * 5000 + ",sad\n")
    found = [(entry.label, entry.reason) for entry in table_source(path).entries()]
    assert found == [
        ("v1.0", None),
        (None, "it has 3 cells, the header has 2"),
        ("7", None),
        (None, "its path has 5,000 characters"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('path,label\n1.png,"happy\n2.png,sad\n', "a quote is not closed"),
        ("path,label,label\n1.png,happy,sad\n", "more than one column label"),
    ],
)
def test_a_table_that_would_lose_rows_is_refused(content, message, tmp_path):
    (tmp_path / "faces.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        list(table_source(tmp_path / "faces.csv").entries())


def test_labels_are_composed_and_binary_columns_are_text(tmp_path):
    table = pa.table({"path": [b"1.png"], "label": [b"gl\x75\xcc\x88cklich"]})
    pq.write_table(table, tmp_path / "faces.parquet")
    (entry,) = table_source(tmp_path / "faces.parquet").entries()
    assert (entry.path, entry.label) == ("1.png", "gl\N{LATIN SMALL LETTER U WITH DIAERESIS}cklich")


def test_a_nul_in_a_path_is_that_row_s(tmp_path):
    (tmp_path / "faces.csv").write_text("path,label\n")
    with pytest.raises(sources.ReadError, match="cannot be read"):
        table_source(tmp_path / "faces.csv").read("b\0/2.png")
