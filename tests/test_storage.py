import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fer_ray import storage
from fer_ray.errors import UserError

names = st.text("abcXYZ019_-.", min_size=1, max_size=8).filter(lambda name: set(name) - {"."})


@given(names, names, names)
def test_joining_naming_and_the_parent_undo_each_other(top, middle, leaf):
    for root in (f"/{top}", f"s3://{top}", f"s3://{top}?scheme=http&endpoint_override=host:9"):
        path = storage.join(root, middle, leaf)
        assert storage.name_of(path) == leaf
        assert storage.parent_of(path) == storage.join(root, middle)
        assert storage.absolute(path) == path


def test_a_query_stays_at_the_end():
    path = storage.join("s3://bucket/runs?scheme=http", "tried", "run.json")
    assert path == "s3://bucket/runs/tried/run.json?scheme=http"


def test_unknown_schemes_are_refused():
    with pytest.raises(UserError):
        storage.filesystem("nonsense://bucket/x")


@pytest.mark.parametrize("name", ["a/b", "", ".hidden", "a b", "../x", "-x"])
def test_names_are_plain(name):
    with pytest.raises(UserError, match=r"--run: .* is not a plain name"):
        storage.check_name("--run", name)


def test_files_and_folders_through_a_uri(tmp_path):
    path = f"file://{tmp_path}/deep/values.json"
    storage.write_json(path, {"a": [1]})
    assert json.loads((tmp_path / "deep/values.json").read_text()) == {"a": [1]}
    assert storage.read_json(path) == {"a": [1]}
    assert storage.list_names(f"file://{tmp_path}/deep") == ["values.json"]
    storage.remove(path)
    assert not storage.exists(path)
    with pytest.raises(ValueError):
        storage.write_json(path, float("nan"))


def test_bytes_are_written_as_they_are_whatever_the_name(tmp_path, monkeypatch):
    """In an object store pyarrow would compress what is named so, once more."""
    monkeypatch.setattr(storage, "_is_local", lambda fs: False)
    for name in ("trace.json.gz", "x.zst"):
        storage.write_bytes(str(tmp_path / name), b"content")
        assert (tmp_path / name).read_bytes() == b"content"


def test_a_link_stays_and_leads_to_what_is_new(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for content in ("first", "second"):
        with storage.staged_directory(str(tmp_path / "link")) as staging:
            Path(staging, "file").write_text(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / "file").read_text() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_what_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out"
    with (
        pytest.raises(UserError, match="was created by another process meanwhile"),
        storage.staged_directory(str(target)) as staging,
    ):
        Path(staging, "file").touch()
        target.mkdir()
        (target / "precious").touch()
    assert [path.name for path in target.iterdir()] == ["precious"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_long_a_name_leaves_nothing(tmp_path):
    with pytest.raises(OSError), storage.staged_directory(str(tmp_path / ("x" * 240))):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["~no-such-user/x", "c/\udcff", "s3://", "a\0b"])
def test_what_is_no_place_is_a_user_error(path):
    with pytest.raises(UserError):
        storage.filesystem(path)


def test_the_folder_of_a_file_at_the_top_is_the_top():
    assert storage.parent_of("/x.csv") == "/"


@pytest.fixture
def occupied(tmp_path) -> str:
    """The URI of a folder that holds something: it is written in place, as in an object store."""
    path = f"file://{tmp_path}/out"
    for name in ("train/part-00000.parquet", "validation/part-00000.parquet", "dataset.json"):
        storage.write_bytes(f"{path}/{name}", b"old")
    return path


def fail_after(removals: int, monkeypatch) -> list[str]:
    """Lets removing break off, as if the process were killed; what is removed until then."""
    remove, removed = storage.remove, []

    def breaking(path: str) -> None:
        if len(removed) == removals:
            raise KeyboardInterrupt
        remove(path)
        removed.append(storage.name_of(path))

    monkeypatch.setattr(storage, "remove", breaking)
    return removed


def write_staged(path: str, *, fails: bool = False) -> None:
    with storage.staged_directory(path) as staging:
        for name in ("train/part-00000.parquet", "test/part-00000.parquet", "quarantine.parquet"):
            storage.write_bytes(storage.join(staging, name), b"new")
        if fails:
            raise RuntimeError("the disk is full")


@pytest.mark.parametrize("removals", range(3))
def test_killed_while_the_old_content_is_removed_it_is_unfinished(occupied, removals, monkeypatch):
    with monkeypatch.context() as patch:
        removed = fail_after(removals, patch)
        with pytest.raises(KeyboardInterrupt):
            write_staged(occupied)
    assert len(removed) == removals
    assert removed[:1] in ([], ["dataset.json"]), "what makes readers trust the rest goes first"
    assert storage.is_unfinished(occupied)
    write_staged(occupied)
    assert storage.list_names(occupied) == ["quarantine.parquet", "test", "train"]


@pytest.mark.parametrize("removals", range(4))
def test_killed_while_a_failure_is_cleared_away_it_is_unfinished(tmp_path, removals, monkeypatch):
    path = f"file://{tmp_path}/out"
    with monkeypatch.context() as patch:
        # a first one looks for a file of the folder's name
        fail_after(1 + removals, patch)
        with pytest.raises(KeyboardInterrupt):
            write_staged(path, fails=True)
    assert storage.is_unfinished(path)
    with pytest.raises(RuntimeError, match="full"):
        write_staged(path, fails=True)
    assert not storage.list_names(path)


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with storage.staged_directory(str(target)) as staging:
        storage.write_json(storage.join(staging, "a.json"), 1)
        assert not target.exists()
    with pytest.raises(RuntimeError), storage.staged_directory(str(target)) as staging:
        storage.write_json(storage.join(staging, "b.json"), 2)
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["a.json"]
    with storage.staged_directory(str(target)) as staging:
        storage.write_json(storage.join(staging, "c.json"), 3)
    assert [path.name for path in target.iterdir()] == ["c.json"]
