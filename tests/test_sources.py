"""Folders and zips: what they list, what they read, what they refuse."""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest

from fer_ray import sources
from fer_ray.errors import UserError


def write_folder(root: Path, files: dict[str, bytes]) -> str:
    for path, content in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return str(root)


def write_zip(path: Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


def faces(*paths: str) -> dict[str, bytes]:
    return {path: path.encode() for path in paths}


BOTH = pytest.mark.parametrize("kind", ["folder", "zip"])


def make(kind: str, tmp_path: Path, files: dict[str, bytes]) -> sources.Source:
    if kind == "folder":
        return sources.open_source(write_folder(tmp_path / "faces", files))
    return sources.open_source(write_zip(tmp_path / "faces.zip", files))


@BOTH
def test_entries_are_ordered_and_readable(kind, tmp_path):
    files = faces("b/2.jpg", "a.jpg", "b/1 é.jpg", "b-c/0.png")
    source = make(kind, tmp_path, files)
    assert source.kind == kind
    assert [entry.path for entry in source.entries] == sorted(files)
    assert {entry.path: source.read(entry.path) for entry in source.entries} == files
    assert all(entry.size == len(files[entry.path]) for entry in source.entries)


@BOTH
def test_a_pickled_source_is_small_and_still_reads(kind, tmp_path):
    source = make(kind, tmp_path, faces(*(f"face-{i:04}.jpg" for i in range(500))))
    assert source.entries and source.read("face-0000.jpg")
    pickled = pickle.dumps(source)
    assert len(pickled) < 500
    again = pickle.loads(pickled)
    assert again.read("face-0499.jpg") == b"face-0499.jpg"
    assert again.entries == source.entries


@BOTH
def test_reading_what_is_not_there_is_a_read_error(kind, tmp_path):
    source = make(kind, tmp_path, faces("a.jpg"))
    with pytest.raises(sources.ReadError):
        source.read("b.jpg")


@BOTH
def test_too_large_a_file_is_not_read(kind, tmp_path, monkeypatch):
    source = make(kind, tmp_path, {"a.jpg": b"x" * 100})
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 99)
    with pytest.raises(sources.ReadError, match="100 bytes"):
        source.read("a.jpg")


def test_a_folder_s_fingerprint_follows_paths_and_sizes(tmp_path):
    files = faces("train/happy/a.jpg", "train/sad/b.jpg")

    def fingerprint(name: str, content: dict[str, bytes]) -> str:
        return sources.open_source(write_folder(tmp_path / name, content)).fingerprint()

    first = fingerprint("1", files)
    assert len(first) == 64
    assert fingerprint("2", files) == first
    assert fingerprint("3", {**files, "train/sad/b.jpg": b"longer than it was before"}) != first
    assert fingerprint("4", {**files, "train/sad/c.jpg": b""}) != first


def test_a_zip_s_fingerprint_is_that_of_its_bytes(tmp_path):
    path = write_zip(tmp_path / "faces.zip", faces("a.jpg"))
    expected = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert sources.open_source(path).fingerprint() == expected


@pytest.mark.parametrize("top", ["", "images/", "archive/images/"])
@BOTH
def test_layout_is_found_below_up_to_two_folders(kind, top, tmp_path):
    names = ["train/sad/1.jpg", "train/happy/2.jpg", "val/happy/3.jpg", "test/sad/4.jpg"]
    layout = sources.labelled_layout(make(kind, tmp_path, faces(*(top + name for name in names))))
    assert layout.labels == ("happy", "sad")
    assert layout.splits == {
        "train": [(f"{top}train/happy/2.jpg", "happy"), (f"{top}train/sad/1.jpg", "sad")],
        "validation": [(f"{top}val/happy/3.jpg", "happy")],
        "test": [(f"{top}test/sad/4.jpg", "sad")],
    }
    assert layout.rejected == []


@BOTH
def test_files_in_the_wrong_place_are_named_and_none_is_lost(kind, tmp_path):
    reasons = {
        "readme.txt": "not below a train, validation or test folder",
        "other/x/1.jpg": "not below a train, validation or test folder",
        "train/loose.jpg": "not in a class folder",
        "validation/loose.jpg": "not in a class folder",
        "train/happy/deep/2.jpg": "deeper than split/class/file",
        "train/.DS_Store": "a file of the operating system",
        "train/happy/Thumbs.db": "a file of the operating system",
        "__MACOSX/train/happy/._1.jpg": "a file of the operating system",
        "train/.ipynb_checkpoints/1.jpg": "a hidden file",
    }
    good = ["train/happy/1.jpg", "validation/happy/1.jpg", "test/unsorted.jpg"]
    source = make(kind, tmp_path, faces(*reasons, *good))
    layout = sources.labelled_layout(source)
    assert {file.path: file.reason for file in layout.rejected} == reasons
    assert layout.splits["test"] == [("test/unsorted.jpg", None)]
    assert layout.labels == ("happy",)
    rows = sum(map(len, layout.splits.values()))
    assert rows + len(layout.rejected) == len(source.entries) == len(reasons) + len(good)


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["validation/happy/1.jpg"], "no train images"),
        (["a/b/c/train/happy/1.jpg"], "no train images"),
        (["train/1.jpg"], "no class folder"),
        (["train/happy/1.jpg", "val/joy/1.jpg"], "validation has class folders.*joy"),
        (["a/train/happy/1.jpg", "b/train/happy/1.jpg"], "more than one train folder"),
        ([".DS_Store"], "no train images"),
    ],
)
@BOTH
def test_a_wrong_layout_is_a_user_error(kind, paths, said, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        sources.labelled_layout(make(kind, tmp_path, faces(*paths)))
    assert "\n" not in str(caught.value)


@BOTH
def test_list_files_takes_any_layout(kind, tmp_path):
    source = make(kind, tmp_path, faces("b.jpg", "x/y/z/a.jpg", "x/.DS_Store"))
    files, rejected = sources.list_files(source)
    assert [entry.path for entry in files] == ["b.jpg", "x/y/z/a.jpg"]
    assert [file.path for file in rejected] == ["x/.DS_Store"]


def test_a_zip_with_one_path_twice_keeps_the_first_and_reports_the_second(tmp_path):
    path = tmp_path / "twice.zip"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("train/happy/1.jpg", b"first")
        archive.writestr("train/happy/1.jpg", b"second")
    source = sources.open_source(str(path))
    layout = sources.labelled_layout(source)
    assert layout.splits == {"train": [("train/happy/1.jpg", "happy")]}
    assert source.read("train/happy/1.jpg") == b"first"
    assert [(file.path, "same path" in file.reason) for file in layout.rejected] == [
        ("train/happy/1.jpg", True)
    ]


def test_a_zip_from_windows_has_its_slashes_mended(tmp_path):
    source = sources.open_source(
        write_zip(
            tmp_path / "windows.zip", {"train\\happy\\1.jpg": b"1", "./train/sad/2.jpg": b"2"}
        )
    )
    assert [entry.path for entry in source.entries] == ["train/happy/1.jpg", "train/sad/2.jpg"]
    assert source.read("train/happy/1.jpg") == b"1"


def test_a_damaged_entry_of_a_zip_is_a_read_error(tmp_path):
    path = Path(write_zip(tmp_path / "damaged.zip", {"1.jpg": os.urandom(2000), "2.jpg": b"2"}))
    content = bytearray(path.read_bytes())
    content[500:600] = bytes(100)
    path.write_bytes(content)
    source = sources.open_source(str(path))
    with pytest.raises(sources.ReadError, match="unpacked"):
        source.read("1.jpg")
    assert source.read("2.jpg") == b"2"


def test_what_a_folder_holds_beside_files_is_reported_and_never_opened(tmp_path):
    root = write_folder(tmp_path / "faces", faces("train/happy/1.jpg"))
    os.mkfifo(f"{root}/train/happy/pipe.jpg")
    Path(root, "train/happy/broken.jpg").symlink_to("nowhere")
    Path(root, "train/happy/linked.jpg").symlink_to("1.jpg")
    Path(root, "train/circle").symlink_to("../..")
    Path(os.fsdecode(f"{root}/train/happy/".encode() + b"\xff.jpg")).write_bytes(b"x")
    layout = sources.labelled_layout(sources.open_source(root))
    assert layout.splits == {
        "train": [("train/happy/1.jpg", "happy"), ("train/happy/linked.jpg", "happy")]
    }
    assert [(file.path, file.reason) for file in layout.rejected] == [
        ("train/happy/\\xff.jpg", "the file's name is not UTF-8"),
        ("train/happy/broken.jpg", "a broken link or not a plain file"),
        ("train/happy/pipe.jpg", "a broken link or not a plain file"),
    ]


def test_a_uri_reads_like_a_path(tmp_path):
    files = faces("train/happy/1.jpg", "train/sad/2.jpg")
    folder = sources.open_source("file://" + write_folder(tmp_path / "faces", files))
    archive = sources.open_source("file://" + write_zip(tmp_path / "faces.zip", files))
    for source in (folder, archive):
        assert {entry.path: source.read(entry.path) for entry in source.entries} == files


def test_what_is_no_source_is_refused(tmp_path):
    text = tmp_path / "faces.txt"
    text.write_text("x")
    false_zip = tmp_path / "faces.zip"
    false_zip.write_text("this is no zip")
    for place, said in [
        (tmp_path / "absent", "does not exist"),
        (text, "neither a folder nor a .zip"),
        (false_zip, "not a readable zip"),
    ]:
        with pytest.raises(UserError, match=said):
            _ = sources.open_source(str(place)).entries
