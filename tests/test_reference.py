import json
from pathlib import Path

import pytest

from fer_ray import reference
from fer_ray.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "results" / "reference"


@pytest.mark.parametrize(("section", "made"), list(zip(reference.SECTIONS, reference.MAKERS)))
def test_the_readme_shows_what_the_records_say(section, made):
    text = (ROOT / "README.md").read_text()
    shown = text.split(reference.BEGIN.format(section))[1].split(reference.END.format(section))[0]
    assert shown.strip() == made(KEPT).strip(), "run `make reference`"


def test_the_records_hold_no_path_of_a_machine_and_no_picture():
    files = [path for path in KEPT.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert path.suffix in (".json", ".parquet", ".html"), path
        assert b"data:image" not in content, path
        if path.suffix == ".json":
            values = json.dumps(json.loads(content))
            assert '"/' not in values, f"{path}: an absolute path"


def test_collecting_makes_paths_relative(tmp_path):
    results, kept = tmp_path / "results", tmp_path / "results" / "reference"
    run = results / "runs" / "tried"
    run.mkdir(parents=True)
    for name in ("config.json", "run.json", "history.parquet"):
        (run / name).write_text(json.dumps({"data": [f"{tmp_path}/data/faces", "/a/b/c"]}))
    unfinished = results / "runs" / "broken_off"
    unfinished.mkdir()
    (unfinished / "config.json").write_text("{}")
    with pytest.raises(UserError, match="predictions: missing"):
        reference.collect(results, kept, tmp_path)
    for split in ("train", "validation"):
        folder = results / "predictions" / "tried" / split
        folder.mkdir(parents=True)
        (folder / "_manifest.json").write_text("{}")
    (results / "evaluation").mkdir()
    reference.collect(results, kept, tmp_path)
    saved = json.loads((kept / "runs" / "tried" / "config.json").read_text())
    assert saved == {"data": ["data/faces", "b/c"]}
    found = sorted(str(p.relative_to(kept)) for p in kept.rglob("*.json"))
    assert found == [
        "predictions/tried/validation/_manifest.json",
        "runs/tried/config.json",
        "runs/tried/run.json",
    ]


def test_the_markers_are_needed(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    with pytest.raises(UserError, match="are missing"):
        reference.update(readme, "runs", "x")
    begin, end = reference.BEGIN.format("runs"), reference.END.format("runs")
    readme.write_text(f"a\n{begin}\nold\n{end}\nb\n")
    assert reference.update(readme, "runs", "new")
    assert readme.read_text() == f"a\n{begin}\nnew\n{end}\nb\n"
    assert not reference.update(readme, "runs", "new")
