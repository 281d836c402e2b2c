"""Datasets from every type of source: split, deduplicated, complete, and previewed."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from faces import HOSTILE, KEPT, image_file, prepare, split_of, write_classes
from hypothesis import given, settings
from hypothesis import strategies as st

from fer_ray.data import dataset, decoding
from fer_ray.data.sources import files as source_files
from fer_ray.errors import UserError
from fer_ray.preparation import preview, run, shards
from fer_ray.preparation.plan import plan_preparation

# ------------------------------------------------------------------ splits and duplicates


def test_a_folder_without_splits_is_split_by_class(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 16)
    source = write_classes(tmp_path / "faces", 40, ("calm", "glad", "tense"))
    info = prepare(source, tmp_path / "out", validation_fraction=0.25, seed=3)
    assert info["labels"] == ["calm", "glad", "tense"]
    assert info["splits"]["validation"]["classes"] == {"calm": 10, "glad": 10, "tense": 10}
    assert info["splits"]["train"]["rows"] == 90
    assert info["held_out_for_validation"] == {"fraction": 0.25, "seed": 3}
    assert info["duplicates"]["twins_in_train"] == {"validation": 0}
    read = dataset.read_info(str(tmp_path / "out"))
    for name in ("train", "validation"):
        split = dataset.load_split(read, name)
        assert split.image_ids == sorted(split.image_ids)
        rows = split_of(tmp_path / "out", name)
        assert set(rows["split"]) == {name}
        for image_id, image in zip(split.image_ids, split.images):
            stored = decoding.decode((source / image_id).read_bytes())
            assert np.array_equal(image, stored)
    again = prepare(source, tmp_path / "again", validation_fraction=0.25, seed=3)
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 2048)
    whole = prepare(source, tmp_path / "whole", validation_fraction=0.25, seed=3)
    other = prepare(source, tmp_path / "other", validation_fraction=0.25, seed=4)
    assert info["data_sha256"] == again["data_sha256"] == whole["data_sha256"]
    assert other["data_sha256"] != info["data_sha256"]


def test_validation_can_be_held_out_beside_a_test_split(ray_cluster, tmp_path):
    write_classes(tmp_path / "faces" / "train", 20, ("calm", "glad"))
    write_classes(tmp_path / "faces" / "test", 5, ("calm", "glad"))
    lines: list[str] = []
    plan = plan_preparation(source=str(tmp_path / "faces"), output=str(tmp_path / "out"))
    info = run.prepare(plan, log=lines.append)
    assert list(info["splits"]) == ["train", "test"]
    assert any("no validation split" in line and "--validation-fraction" in line for line in lines)
    info = prepare(tmp_path / "faces", tmp_path / "out", validation_fraction=0.2, overwrite=True)
    assert {name: split["rows"] for name, split in info["splits"].items()} == {
        "train": 32,
        "validation": 8,
        "test": 10,
    }


def test_deduplicate_drops_from_train_what_other_splits_have(ray_cluster, hostile, tmp_path):
    before = prepare(hostile, tmp_path / "before")
    info = prepare(hostile, tmp_path / "out", deduplicate=True)
    assert before["duplicates"]["twins_in_train"]["validation"] == 1
    assert info["duplicates"]["twins_in_train"] == {"validation": 0, "test": 0}
    ids = list(split_of(tmp_path / "out", "train")["image_id"])
    assert ids == ["images/train/happy/2.jpg", "images/train/sad/large.png"]
    quarantine = pd.read_parquet(tmp_path / "out" / "quarantine.parquet")
    reasons = dict(zip(quarantine["path"], quarantine["reason"]))
    assert "a duplicate is in validation" in reasons["images/train/sad/1 again.png"]
    assert info["quarantined"] + KEPT - 3 == len(HOSTILE) == len(quarantine) + KEPT - 3
    images = dataset.load_split(dataset.read_info(str(tmp_path / "out")), "train").images
    assert info["pixel_mean"] == pytest.approx(images.mean() / 255, abs=1e-12)


def test_the_duplicates_file_lists_every_duplicate(ray_cluster, hostile, tmp_path):
    prepare(hostile, tmp_path / "out")
    duplicates = pd.read_parquet(tmp_path / "out" / "duplicates.parquet")
    assert sorted(duplicates["image_id"]) == [
        "images/train/happy/1.png",
        "images/train/happy/same as 1.png",
        "images/train/sad/1 again.png",
        "images/validation/happy/duplicate.png",
    ]
    assert duplicates["conflicting_labels"].all()
    assert duplicates["pixel_sha256"].nunique() == 1
    rows = split_of(tmp_path / "out", "validation").set_index("image_id")
    assert rows.loc["images/validation/happy/duplicate.png", "pixel_sha256"] in set(
        duplicates["pixel_sha256"]
    )


def test_images_of_the_official_test_split_in_validation_cause_a_warning(ray_cluster, tmp_path):
    for path in ("train/a/1.png", "train/b/2.png", "validation/a/PrivateTest_3.png"):
        (tmp_path / "faces" / path).parent.mkdir(parents=True)
        (tmp_path / "faces" / path).write_bytes(image_file(int(path[-5])))
    lines: list[str] = []
    plan = plan_preparation(source=str(tmp_path / "faces"), output=str(tmp_path / "out"))
    run.prepare(plan, log=lines.append)
    assert any(line.startswith("warning:") and "(1 named PrivateTest)" in line for line in lines)


def test_fer2013_csv_is_prepared_like_image_files(ray_cluster, tmp_path):
    lines, tones = ["emotion,pixels,Usage"], {}
    usages = ["Training"] * 6 + ["PublicTest"] * 2 + ["PrivateTest"] * 2
    for index, usage in enumerate(usages):
        tones[f"line-{index + 2:07d}"] = pixels = np.random.default_rng(index).integers(
            0, 256, 2304
        )
        lines.append(f"{3 if index % 2 else 4},{' '.join(map(str, pixels))},{usage}")
    lines += ["0,1 2 x 4,Training", "9,1 2 3 4,Training"]
    (tmp_path / "fer2013.csv").write_text("\n".join(lines))
    info = prepare(tmp_path / "fer2013.csv", tmp_path / "out")
    assert info["labels"] == ["angry", "happy", "sad"]
    assert [split["rows"] for split in info["splits"].values()] == [6, 2, 2]
    assert info["quarantined"] == 2
    assert info["source"]["kind"] == "pixels"
    for split in info["splits"]:
        for row in split_of(tmp_path / "out", split).itertuples():
            assert row.label == ("happy" if int(row.image_id[-2:]) % 2 else "sad")
            assert list(row.image) == tones[row.image_id].tolist()


def test_a_table_of_paths_is_prepared(ray_cluster, tmp_path):
    write_classes(tmp_path / "faces", 10, ("calm", "glad"))
    rows = [
        (f"faces/{label}/{index:03}.png", label)
        for label in ("calm", "glad")
        for index in range(11)
    ]
    pd.DataFrame([*rows, rows[0]], columns=["path", "label"]).to_csv(
        tmp_path / "faces.csv", index=False
    )
    info = prepare(tmp_path / "faces.csv", tmp_path / "out", validation_fraction=0.2)
    assert {name: split["rows"] for name, split in info["splits"].items()} == {
        "train": 16,
        "validation": 4,
    }
    quarantine = pd.read_parquet(tmp_path / "out" / "quarantine.parquet")
    assert list(quarantine["path"]) == [
        "faces/calm/000.png",
        "faces/calm/010.png",
        "faces/glad/010.png",
    ]
    assert quarantine["reason"][0] == source_files.REPEATED
    assert "No such file" in quarantine["reason"][1]


CONTENTS = st.sampled_from(
    [
        *(image_file(1), image_file(2), image_file(3, (5, 70)), image_file(4, file_format="JPEG")),
        *(image_file(5, file_format="JPEG")[:300], b"", b"no image", image_file(6)[:40]),
    ]
)
PATHS = st.builds(
    "/".join,
    st.lists(
        st.sampled_from(
            ["train", "val", "test", "images", "a", "b", "ü", ".x", "Thumbs.db", "1.PNG"]
        ),
        min_size=1,
        max_size=4,
    ),
)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(PATHS, CONTENTS, max_size=12), st.booleans(), st.booleans())
def test_rows_and_quarantined_files_are_all_files_of_any_source(
    ray_cluster, tmp_path_factory, files, deduplicate, doubled
):
    """Zips that Hypothesis builds are refused in one line, or no file of them is lost."""
    root = tmp_path_factory.mktemp("any")
    entries = [*files.items(), *(list(files.items())[:2] if doubled else [])]
    with warnings.catch_warnings(), zipfile.ZipFile(root / "any.zip", "w") as archive:
        warnings.simplefilter("ignore")
        for path, content in entries:
            archive.writestr(path, content)
    try:
        info = prepare(root / "any.zip", root / "out", deduplicate=deduplicate)
    except UserError as error:
        assert "\n" not in str(error)
        assert [path.name for path in root.iterdir()] == ["any.zip"]
        return
    kept = sum(split["rows"] for split in info["splits"].values())
    quarantine = pd.read_parquet(root / "out" / "quarantine.parquet")
    assert kept + len(quarantine) == len(entries)
    assert info["quarantined"] == len(quarantine)
    assert quarantine["reason"].str.len().gt(5).all()
    frames = [split_of(root / "out", split) for split in info["splits"]]
    rows = pd.concat(frames)
    assert rows["image_id"].is_unique
    assert sorted([*rows["image_id"], *quarantine["path"]]) == sorted(path for path, _ in entries)


# ------------------------------------------------------------------ the preview


def test_the_preview_shows_samples_balance_and_duplicates(ray_cluster, hostile, tmp_path):
    page = preview.check(str(tmp_path / "page.html"))
    lines: list[str] = []
    plan = plan_preparation(source=str(hostile), output=str(tmp_path / "out"))
    run.prepare(plan, log=lines.append, finish=preview.writer(page, lines.append))
    assert lines[-1] == f"preview: {page}"
    text = Path(page).read_text()
    assert text.count("<svg") == 3
    # 8 labelled images as samples, and 4 duplicates
    assert text.count('<img src="data:image/png') == KEPT - 1 + 4
    assert "images/train/sad/1 again.png" in text
    assert "1 × the file is empty" in text
    assert "http:" not in text and "https:" not in text


def test_the_preview_names_a_source_that_has_no_path(ray_cluster, tmp_path):
    page = preview.check(str(tmp_path / "page.html"))
    plan = plan_preparation(source="synthetic", output=str(tmp_path / "out"), num_images=14)
    run.prepare(plan, log=lambda line: None, finish=preview.writer(page, lambda line: None))
    assert "\nfrom synthetic. The train pixels" in Path(page).read_text()


def test_an_unusable_path_of_the_preview_is_refused(tmp_path):
    for path, message in [
        (tmp_path, "is a folder"),
        (tmp_path / "page.pdf", "does not end in .html"),
        (tmp_path / "absent" / "page.html", "there is no folder"),
    ]:
        with pytest.raises(UserError, match=message):
            preview.check(str(path))


def test_deduplicating_all_of_train_is_refused(ray_cluster, tmp_path):
    for split in ("train", "test"):
        for number, label in enumerate(("calm", "glad")):
            folder = tmp_path / "faces" / split / label
            folder.mkdir(parents=True)
            (folder / "1.png").write_bytes(image_file(number))
    with pytest.raises(UserError, match="no train image can be used: a duplicate is in test"):
        prepare(tmp_path / "faces", tmp_path / "out", deduplicate=True)
    assert not (tmp_path / "out").exists()


def test_a_label_called_total_has_a_column_of_its_own(ray_cluster, tmp_path):
    write_classes(tmp_path / "faces" / "train", 3, ("glad", "total"))
    lines: list[str] = []
    plan = plan_preparation(source=str(tmp_path / "faces"), output=str(tmp_path / "out"))
    run.prepare(plan, log=lines.append)
    (row,) = [line.split() for line in lines if line.startswith("train ")]
    assert row == ["train", "3", "3", "6"]


def test_dropped_images_leave_no_empty_split_or_stale_shard(ray_cluster, tmp_path):
    write_classes(tmp_path / "faces" / "train", 3, ("calm", "glad"))
    write_classes(tmp_path / "faces" / "test", 1, ("calm", "glad"))
    info = prepare(tmp_path / "faces", tmp_path / "out", deduplicate=True)
    assert set(info["splits"]) == {"train", "test"}
    assert not (tmp_path / "out" / "validation").exists()
    for split in ("train", "test"):
        listed = {Path(file).name for file in info["splits"][split]["files"]}
        assert {path.name for path in (tmp_path / "out" / split).iterdir()} == listed
        assert len(split_of(tmp_path / "out", split)) == info["splits"][split]["rows"]
