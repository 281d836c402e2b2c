"""Zips are read as Python's own reader reads them, in little memory, whatever they hold."""

from __future__ import annotations

import hashlib
import io
import os
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fer_ray.data import sources
from fer_ray.data.sources import files as source_files
from fer_ray.data.sources.zips import ZipSource
from fer_ray.errors import UserError

EXTREMES = [(2**64 - 1).to_bytes(8), (2**63).to_bytes(8, "little"), bytes(8), b"\xff" * 4]
METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]
NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\\"), min_size=1, max_size=20
).filter(lambda name: not name.endswith("/"))


def everything(path: Path) -> list[tuple[str, bytes | str]]:
    """Path and content, or the reason why there is none, of every entry."""
    source = ZipSource(str(path))
    found: list[tuple[str, bytes | str]] = []
    for entry in source.entries():
        try:
            found.append((entry.path, entry.reason or source.read(entry.path, entry.at)))
        except sources.ReadError as error:
            found.append((entry.path, str(error)))
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=3000), st.sampled_from(METHODS)), max_size=8),
    st.binary(max_size=40),
    st.binary(max_size=30),
    st.booleans(),
)
def test_every_zip_reads_as_python_reads_it(tmp_path_factory, files, prefix, comment, streamed):
    path = tmp_path_factory.mktemp("zip") / "a.zip"
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of equal names
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.comment = comment
            for name, content, method in files:
                info = zipfile.ZipInfo(name)
                info.compress_type = method
                with archive.open(info, "w", force_zip64=streamed) as stream:
                    stream.write(content)
    path.write_bytes(prefix + buffer.getvalue())
    found = everything(path)
    assert len(found) == len(files)
    for (path_found, read), (name, content, _) in zip(found, files):
        outside = name.startswith("/") or ".." in name.split("/")
        assert read == ("its path points outside the zip" if outside else content)
        plain = [part for part in name.split("/") if part not in ("", ".")]
        assert path_found == ("/".join(plain) or "(no name)")


def write_wide(path: Path, count: int) -> None:
    """A small zip that says all of its numbers in 64 bits, as large ones do."""
    with (
        mock.patch.object(zipfile, "ZIP64_LIMIT", -1),
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for index in range(count):
            archive.writestr(f"train/happy/{index}.jpg", bytes(range(100)) * (index + 1))


def test_a_zip_that_says_its_numbers_in_64_bits_is_read(tmp_path):
    write_wide(tmp_path / "wide.zip", 3)
    content = (tmp_path / "wide.zip").read_bytes()
    assert content.count(b"PK\6\6") == content.count(b"PK\6\7") == 1
    assert everything(tmp_path / "wide.zip") == [
        (f"train/happy/{index}.jpg", bytes(range(100)) * (index + 1)) for index in range(3)
    ]


@pytest.mark.parametrize("place", [2**63 - 1, 2**63, 2**64 - 1])
def test_a_64_bit_directory_beyond_any_file_is_refused(place, tmp_path):
    path = tmp_path / "far.zip"
    write_wide(path, 1)
    content = bytearray(path.read_bytes().replace(b"PK\6\6", b"PK\6\0"))
    locator = content.index(b"PK\6\7")
    content[locator + 8 : locator + 16] = place.to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(UserError, match="64-bit directory is not at the declared position"):
        everything(path)


def test_more_entries_than_16_bits_count_are_listed_in_little_memory(tmp_path):
    count = 70_000
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for index in range(count):
            archive.writestr(zipfile.ZipInfo(f"images/train/happy/{index:07}.jpg"), b"x")
    source = ZipSource(str(tmp_path / "many.zip"))
    tracemalloc.start()
    try:
        listed = 0
        for entry in source.entries():
            listed, last = listed + 1, entry
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert listed == count
    assert source.read(last.path, last.at) == b"x"
    # zipfile takes some 35 MiB for these
    assert peak < 8 * 2**20


def test_offsets_beyond_32_bits_are_read(tmp_path):
    """A zip after a gap of 5 GB, which takes no room on the disk."""
    path = tmp_path / "large.zip"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jpg", b"first")
        archive.writestr("b.jpg", b"second")
    with path.open("wb") as stream:
        stream.seek(5 * 2**30)
        stream.write(buffer.getvalue())
    assert everything(path) == [("a.jpg", b"first"), ("b.jpg", b"second")]
    with path.open("wb") as stream:  # and one that says so itself
        stream.seek(5 * 2**30)
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("a.jpg", b"first")
    assert everything(path) == [("a.jpg", b"first")]


def test_one_path_twice_gives_two_entries_each_with_its_own_content(tmp_path):
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("1.jpg", b"first")
        archive.writestr("1.jpg", b"second")
    assert everything(tmp_path / "twice.zip") == [("1.jpg", b"first"), ("1.jpg", b"second")]
    files, others = sources.list_files(ZipSource(str(tmp_path / "twice.zip")))
    assert [entry.path for entry in files] == ["1.jpg"]
    assert [(entry.path, entry.reason) for entry in others] == [("1.jpg", source_files.REPEATED)]


def test_a_zip_from_windows_has_its_slashes_mended(tmp_path):
    path = tmp_path / "windows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("train\\happy\\1.jpg", "./train/sad/2.jpg", "train\\folder\\"):
            archive.writestr(zipfile.ZipInfo(name), b"" if name.endswith("\\") else b"1")
        archive.writestr(zipfile.ZipInfo("train/full/"), b"lost?")
    assert everything(path) == [
        ("train/happy/1.jpg", b"1"),
        ("train/sad/2.jpg", b"1"),
        ("train/full", "a folder with content"),
    ]


def test_a_directory_that_says_another_number_of_entries_is_refused(tmp_path):
    path = tmp_path / "short.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("1.jpg", "2.jpg"):
            archive.writestr(name, b"x")
    content = bytearray(path.read_bytes())
    end = content.rfind(b"PK\5\6")
    content[end + 10 : end + 12] = (1).to_bytes(2, "little")
    path.write_bytes(content)
    with pytest.raises(UserError, match="declares 1 entries and has 2"):
        everything(path)


def test_a_comment_that_looks_like_the_zip_s_end_is_a_comment(tmp_path):
    path = tmp_path / "comment.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.jpg", b"x")
        archive.comment = b"PK\5\6" + b"\0" * 30
    assert everything(path) == [("1.jpg", b"x")]


def test_names_in_utf_8_are_read_without_the_flag_too(tmp_path):
    path = tmp_path / "plain.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("glücklich.jpg", b"x")
    content = path.read_bytes()
    for mark, offset in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        at = content.find(mark) + offset
        flags = int.from_bytes(content[at : at + 2], "little") & ~0x800
        content = content[:at] + flags.to_bytes(2, "little") + content[at + 2 :]
    path.write_bytes(content)
    assert everything(path) == [("glücklich.jpg", b"x")]


def test_an_impossible_offset_is_one_entry_s(tmp_path):
    path = tmp_path / "far.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("1.jpg", "2.jpg"):
            archive.writestr(name, b"x")
    content = path.read_bytes()
    at = content.find(b"PK\1\2")
    extra = b"\1\0\x08\0" + b"\xff" * 8
    record = bytearray(content[at : at + 46 + 5])
    record[42:46] = b"\xff" * 4
    record[30:32] = len(extra).to_bytes(2, "little")
    content = content[:at] + bytes(record) + extra + content[at + 51 :]
    end = content.rfind(b"PK\5\6")
    length = int.from_bytes(content[end + 12 : end + 16], "little") + len(extra)
    content = content[: end + 12] + length.to_bytes(4, "little") + content[end + 16 :]
    path.write_bytes(content)
    assert everything(path) == [("1.jpg", "it lies beyond the end of the zip"), ("2.jpg", b"x")]


def test_entries_that_point_outside_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "slip.zip", "w") as archive:
        for name in ("../../etc/passwd", "/etc/passwd", "a/../../b.jpg", "..", "a..b/..c.jpg"):
            archive.writestr(name, b"x")
    found = everything(tmp_path / "slip.zip")
    assert [read for _, read in found] == ["its path points outside the zip"] * 4 + [b"x"]


def test_an_encrypted_entry_and_an_unknown_method_say_so(tmp_path):
    path = tmp_path / "odd.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("secret.jpg", b"x" * 50)
        archive.writestr("lzma.jpg", b"x" * 50, zipfile.ZIP_LZMA)
    raw = bytearray(path.read_bytes())
    record = raw.index(b"PK\x01\x02")
    raw[record + 8] |= 1
    path.write_bytes(raw)
    found = dict(everything(path))
    assert found["secret.jpg"] == "it is encrypted"
    assert "compression method 14 is not supported" in found["lzma.jpg"]


def test_a_bomb_does_not_go_off(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(50 * 2**20))
        archive.writestr("honest.jpg", bytes(65 * 2**20))
    raw = bytearray(path.read_bytes())
    record = raw.index(b"PK\x01\x02")
    raw[record + 24 : record + 28] = (1000).to_bytes(4, "little")  # says it is small
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        found = dict(everything(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "size or checksum are not those" in str(found["a.jpg"])
    assert "larger than" in str(found["honest.jpg"])
    assert peak < 8 * 2**20


def test_damage_within_is_one_file_s_and_not_the_zip_s(tmp_path):
    path = tmp_path / "damaged.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.jpg", os.urandom(2000))
        archive.writestr("2.jpg", b"2")
    raw = bytearray(path.read_bytes())
    raw[500:600] = bytes(100)
    path.write_bytes(raw)
    found = dict(everything(path))
    assert "cannot be unpacked" in str(found["1.jpg"])
    assert found["2.jpg"] == b"2"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_is_an_error_of_one_line_or_a_reason(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("zip") / "a.zip"
    if data.draw(st.booleans()):
        write_wide(path, 3)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for index in range(3):
                archive.writestr(f"train/happy/{index}.jpg", bytes(range(100)) * (index + 1))
    raw = bytearray(path.read_bytes())
    # half of it at the end, where the records are that lead to all others
    places = st.integers(0, len(raw) - 1) | st.integers(len(raw) - 98, len(raw) - 1)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(places)
        number = data.draw(st.binary(min_size=1, max_size=1) | st.sampled_from(EXTREMES))
        raw[at : at + len(number)] = number[: len(raw) - at]
    path.write_bytes(
        raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    )
    try:
        found = everything(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(name, str) for name, _ in found)


def test_what_is_no_zip_is_refused_whole(tmp_path):
    good = tmp_path / "good.zip"
    with zipfile.ZipFile(good, "w") as archive:
        archive.writestr("1.jpg", bytes(1000))
    for content in (b"this is no zip", b"", good.read_bytes()[:-30]):
        (tmp_path / "false.zip").write_bytes(content)
        with pytest.raises(UserError, match="not a readable zip") as caught:
            list(ZipSource(str(tmp_path / "false.zip")).entries())
        assert "\n" not in str(caught.value)


def test_the_fingerprint_is_that_of_the_zip_s_bytes(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.jpg", b"x")
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert ZipSource(str(path)).fingerprint(iter(())) == expected
