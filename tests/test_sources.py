"""Folders and zips: how they are listed and read, which layouts they have, what is refused."""

from __future__ import annotations

import os
import pickle
import time
import zipfile
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from fer_ray.data import image_source, sources
from fer_ray.data.sources import files as source_files
from fer_ray.data.sources import folders, layouts
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


def make(kind: str, tmp_path: Path, files: dict[str, bytes]) -> sources.FileSource:
    if kind == "folder":
        return image_source.open_files(write_folder(tmp_path / "faces", files))
    return image_source.open_files(write_zip(tmp_path / "faces.zip", files))


def content(source: sources.FileSource) -> dict[str, bytes]:
    return {entry.path: source.read(entry.path, entry.at) for entry in source.entries()}


def located(source: sources.FileSource) -> list[sources.Entry]:
    return list(layouts.open_layout(source, source.path).entries())


def rows(source: sources.FileSource) -> dict[str, tuple[str | None, str | None]]:
    return {entry.path: (entry.split, entry.label) for entry in located(source) if not entry.reason}


@BOTH
def test_entries_are_listed_with_their_sizes_and_readable(kind, tmp_path):
    files = faces("b/2.jpg", "a.jpg", "b/1 é.jpg", "b-c/0.png")
    source = make(kind, tmp_path, files)
    assert content(source) == files
    assert {entry.path: entry.size for entry in source.entries()} == {
        path: len(data) for path, data in files.items()
    }


@BOTH
def test_a_pickled_source_is_small_and_reads_by_entries_listed_elsewhere(kind, tmp_path):
    source = make(kind, tmp_path, faces(*(f"face-{i:04}.jpg" for i in range(500))))
    last = max(source.entries(), key=lambda entry: entry.path)
    source.read(last.path, last.at)
    pickled = pickle.dumps(source)
    assert len(pickled) < 500
    assert pickle.loads(pickled).read(last.path, last.at) == b"face-0499.jpg"


@BOTH
def test_a_deleted_file_is_a_read_error(kind, tmp_path):
    source = make(kind, tmp_path, {"a.jpg": b"a" * 99, "b.jpg": b"b"})
    gone = next(entry for entry in source.entries() if entry.path == "a.jpg")
    if kind == "folder":
        (tmp_path / "faces" / "a.jpg").unlink()
    else:
        write_zip(tmp_path / "faces.zip", {})
    with pytest.raises(sources.ReadError) as caught:
        pickle.loads(pickle.dumps(source)).read(gone.path, gone.at)
    assert (str(caught.value) == sources.NOT_FOUND) == (kind == "folder")


@BOTH
def test_too_large_a_file_is_not_read(kind, tmp_path, monkeypatch):
    source = make(kind, tmp_path, {"a.jpg": b"x" * 100})
    (entry,) = source.entries()
    monkeypatch.setattr(source_files, "MAX_FILE_BYTES", 99)
    with pytest.raises(sources.ReadError, match="100 bytes"):
        source.read(entry.path, entry.at)


@pytest.mark.parametrize("top", ["", "images/", "archive/images/"])
@BOTH
def test_splits_are_found_below_up_to_two_folders(kind, top, tmp_path):
    names = ["train/sad/1.jpg", "train/happy/2.jpg", "val/happy/3.jpg", "test/sad/4.jpg"]
    source = make(kind, tmp_path, faces(*(top + name for name in names)))
    assert rows(source) == {
        f"{top}train/sad/1.jpg": ("train", "sad"),
        f"{top}train/happy/2.jpg": ("train", "happy"),
        f"{top}val/happy/3.jpg": ("validation", "happy"),
        f"{top}test/sad/4.jpg": ("test", "sad"),
    }
    assert layouts.find_layout(source.path, source.tables()).has_splits


@pytest.mark.parametrize("top", ["", "images/", "archive/images/"])
@BOTH
def test_class_folders_without_splits_are_all_train(kind, top, tmp_path):
    names = {"sad/1.jpg": "sad", "happy/2.jpg": "happy", "happy/a/b.jpg": "deeper", "c.jpg": "not"}
    source = make(kind, tmp_path, faces(*(top + name for name in names), "x/.DS_Store"))
    assert not layouts.find_layout(source.path, source.tables()).has_splits
    assert rows(source) == {
        f"{top}sad/1.jpg": ("train", "sad"),
        f"{top}happy/2.jpg": ("train", "happy"),
    }
    reasons = {entry.path: entry.reason for entry in located(source) if entry.reason}
    assert len(reasons) == 3
    assert "deeper than class/file" in reasons[f"{top}happy/a/b.jpg"]
    assert "not in a class folder" in reasons[f"{top}c.jpg"]


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
    assert {entry.path: entry.reason for entry in located(source) if entry.reason} == reasons
    assert rows(source) == {
        "train/happy/1.jpg": ("train", "happy"),
        "validation/happy/1.jpg": ("validation", "happy"),
        "test/unsorted.jpg": ("test", None),
    }


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["validation/happy/1.jpg"], "found validation but no train"),
        (["val/happy/1.jpg", "val/sad/1.jpg"], "found val but no train"),
        (["a/b/c/train/happy/1.jpg"], "none in a class folder"),
        (["happy/1.jpg"], "one class folder: happy"),
        (["a/train/happy/1.jpg", "b/train/happy/1.jpg"], "more than one train folder"),
        (["a/happy/1.jpg", "a/sad/1.jpg", "b/happy/1.jpg", "b/sad/1.jpg"], "several places: a, b"),
        (["1.jpg", "2.jpg"], "found 2 files, none in a class folder"),
        ([".DS_Store"], "no files that may be images"),
    ],
)
@BOTH
def test_a_wrong_layout_is_a_user_error_with_what_was_found(kind, paths, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        layouts.open_layout(make(kind, tmp_path, faces(*paths)), "")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("paths", "folder"),
    [
        (["train/1.jpg", "happy/2.jpg", "sad/3.jpg"], "train"),
        (["test/1.jpg", "happy/2.jpg", "sad/3.jpg"], "test"),
        (["faces/val/1.jpg", "faces/happy/2.jpg", "faces/sad/3.jpg"], "faces/val"),
        (["train/1.jpg", "train/2.jpg", "train/old/3.jpg", "happy/4.jpg", "sad/5.jpg"], "train"),
    ],
)
@BOTH
def test_a_class_with_the_name_of_a_split_is_refused(kind, paths, folder, tmp_path):
    """Read as a split, it would leave its sibling classes out of the dataset."""
    message = rf": {folder} has the name of a split, .*beside it \(happy, sad\): .* rename the"
    with pytest.raises(UserError, match=message) as caught:
        layouts.open_layout(make(kind, tmp_path, faces(*paths)), "")
    assert "\n" not in str(caught.value)


@BOTH
def test_a_class_with_the_name_of_a_split_is_a_class_below_the_splits(kind, tmp_path):
    files = faces(
        *(f"{split}/{name}/1.jpg" for split in ("train", "val") for name in ("train", "sad"))
    )
    assert rows(make(kind, tmp_path, files)) == {
        "train/train/1.jpg": ("train", "train"),
        "train/sad/1.jpg": ("train", "sad"),
        "val/train/1.jpg": ("validation", "train"),
        "val/sad/1.jpg": ("validation", "sad"),
    }


@BOTH
def test_list_files_takes_any_layout(kind, tmp_path):
    source = make(kind, tmp_path, faces("b.jpg", "x/y/z/a.jpg", "x/.DS_Store"))
    files, others = sources.list_files(source)
    assert [entry.path for entry in files] == ["b.jpg", "x/y/z/a.jpg"]
    assert [entry.path for entry in others] == ["x/.DS_Store"]


def test_what_a_folder_holds_beside_files_is_reported_and_never_opened(tmp_path):
    root = write_folder(tmp_path / "faces", faces("train/happy/1.jpg"))
    os.mkfifo(f"{root}/train/happy/pipe.jpg")
    Path(root, "train/happy/broken.jpg").symlink_to("nowhere")
    Path(root, "train/happy/linked.jpg").symlink_to("1.jpg")
    Path(root, "train/circle").symlink_to("../..")
    Path(os.fsdecode(f"{root}/train/happy/".encode() + b"\xff.jpg")).write_bytes(b"x")
    source = image_source.open_files(root)
    assert rows(source) == {
        "train/happy/1.jpg": ("train", "happy"),
        "train/happy/linked.jpg": ("train", "happy"),
    }
    assert {entry.path: entry.reason for entry in located(source) if entry.reason} == {
        "train/happy/\\xff.jpg": "the file's name is not UTF-8",
        "train/circle": "a link to a folder that is read already",
        "train/happy/broken.jpg": "a broken link",
        "train/happy/pipe.jpg": "not a regular file",
    }


def test_cyclic_links_are_reported_and_not_followed(tmp_path):
    root = Path(write_folder(tmp_path / "faces", faces("train/happy/1.jpg", "train/sad/2.jpg")))
    (root / "train/happy/me").symlink_to("me")
    (root / "train/happy/x").symlink_to("../sad")
    (root / "train/sad/y").symlink_to("../happy")
    found = {entry.path: entry.reason for entry in image_source.open_files(str(root)).entries()}
    assert found["train/happy/1.jpg"] is None and found["train/sad/2.jpg"] is None
    assert found["train/happy/me"] == "a broken link"
    assert len(found) < 10
    assert "a link to a folder that is read already" in found.values()


def test_very_many_folders_are_looked_through_quickly():
    entries = (
        sources.Entry(path=f"person{number // 3}/session{number}/1.jpg") for number in range(60_000)
    )
    start = time.monotonic()
    with pytest.raises(UserError, match="no train images"):
        layouts.find_layout("many", source_files.tables_of(entries))
    assert time.monotonic() - start < 10


@BOTH
def test_a_source_with_a_layout_is_listed_once(kind, tmp_path, monkeypatch):
    source = make(kind, tmp_path, faces("train/happy/1.jpg", "train/sad/2.jpg", "val/sad/3.jpg"))
    listings, tables = [], type(source).tables
    monkeypatch.setattr(type(source), "tables", lambda self: listings.append(1) or tables(self))
    images = layouts.open_layout(source, "faces")
    paths = ["train/happy/1.jpg", "train/sad/2.jpg", "val/sad/3.jpg"]
    for _ in range(2):
        assert sorted(entry.path for entry in images.entries()) == paths
    assert listings == [1]
    assert len(pickle.dumps(images)) < 1000


def test_the_reason_for_a_folder_does_not_depend_on_open_files(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"^\[Errno 21\] Is a directory$"):
        folders.read_file(pafs.LocalFileSystem(), "", str(tmp_path))


def test_a_pipe_that_a_table_names_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(sources.ReadError, match="not a regular file"):
            folders.read_file(pafs.LocalFileSystem(), "", path)


def test_of_equal_paths_a_readable_entry_wins(tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("/a.png", b"out")
        archive.writestr("a.png", b"in")
    files, others = sources.list_files(image_source.open_files(str(tmp_path / "two.zip")))
    assert [(entry.path, entry.reason) for entry in files] == [("a.png", None)]
    assert [entry.reason for entry in others] == ["its path points outside the zip"]


def test_a_folder_s_fingerprint_follows_paths_and_sizes(tmp_path):
    source = image_source.open_files(write_folder(tmp_path / "faces", faces("a.jpg")))

    def fingerprint(*listing: tuple[str, int]) -> str:
        return source.fingerprint(iter(listing))

    first = fingerprint(("a.jpg", 5), ("b.jpg", 6))
    assert len(first) == 64
    assert fingerprint(("a.jpg", 5), ("b.jpg", 6)) == first
    assert len({first, fingerprint(("a.jpg", 5)), fingerprint(("a.jpg", 5), ("b.jpg", 7))}) == 3


@BOTH
def test_a_uri_reads_like_a_path(kind, tmp_path):
    files = faces("train/happy/1.jpg", "train/sad/2.jpg")
    path = make(kind, tmp_path, files).path
    assert content(image_source.open_files(f"file://{path}")) == files


def test_a_link_in_a_folder_whose_name_is_not_utf_8_has_a_printable_path(tmp_path):
    root = write_folder(tmp_path / "faces", faces("train/happy/1.jpg"))
    odd = os.fsencode(root) + b"/train/caf\xe9"
    os.mkdir(odd)  # noqa: PTH102 -- a path of bytes
    os.symlink(b"..", odd + b"/up")  # noqa: PTH211
    reasons = {entry.path: entry.reason for entry in image_source.open_files(root).entries()}
    assert reasons == {
        "train/happy/1.jpg": None,
        "train/caf\\xe9/up": "a link to a folder that is read already",
    }
    assert all(path.encode() for path in reasons)


@BOTH
def test_a_few_images_beside_a_folder_of_classes_are_no_classes(kind, tmp_path):
    many = [f"faces/{label}/{index}.jpg" for label in ("happy", "sad") for index in range(5)]
    strays = {"logos/1.png": "not in a class folder", "screenshots/2.png": "not in a class folder"}
    source = make(kind, tmp_path, faces(*strays, *many))
    assert layouts.find_layout(source.path, source.tables()) == layouts.Layout(
        top=("faces",), has_splits=False
    )
    assert rows(source) == {path: ("train", path.split("/")[1]) for path in many}
    assert {entry.path: entry.reason for entry in located(source) if entry.reason} == strays


@BOTH
def test_folders_within_a_class_are_no_classes_however_full(kind, tmp_path):
    own = [f"{label}/{n}.jpg" for label in ("happy", "sad") for n in range(5)]
    batches = [f"happy/batch{batch}/{n}.jpg" for batch in (1, 2) for n in range(20)]
    source = make(kind, tmp_path, faces(*own, *batches))
    assert layouts.find_layout(source.path, source.tables()).top == ()
    assert rows(source) == {path: ("train", path.split("/")[0]) for path in own}


def test_a_stray_image_beside_the_classes_makes_no_class_of_their_folder(tmp_path):
    many = [f"faces/{label}/{n}.jpg" for label in ("happy", "sad") for n in range(20)]
    source = make("folder", tmp_path, faces(*many, "faces/cover.jpg", "logos/1.png"))
    assert layouts.find_layout(source.path, source.tables()).top == ("faces",)


def test_with_equally_many_files_the_upper_folders_are_the_classes(tmp_path):
    paths = ["happy/1.jpg", "sad/2.jpg", "more/a/3.jpg", "more/b/4.jpg"]
    source = make("folder", tmp_path, faces(*paths))
    assert layouts.find_layout(source.path, source.tables()).top == ()


def test_classes_in_several_folders_are_refused_despite_a_few_others(tmp_path):
    many = [f"{top}/{label}/{n}.jpg" for top in "ab" for label in ("sad", "glad") for n in range(9)]
    source = make("folder", tmp_path, faces(*many, "logos/1.png", "screenshots/2.png"))
    with pytest.raises(UserError, match="class folders in several places: a, b"):
        layouts.find_layout(source.path, source.tables())


def test_what_is_not_a_source_is_refused(tmp_path):
    text = tmp_path / "faces.txt"
    text.write_text("x")
    for path, message in [
        (tmp_path / "absent", "does not exist"),
        (text, "is not a known type of source; expected: a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            image_source.open_files(str(path))
