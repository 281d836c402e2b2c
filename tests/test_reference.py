import json
from pathlib import Path

import pytest

from fer_ray.benchmarks import reference, targets
from fer_ray.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "results" / "reference"


@pytest.mark.parametrize("section", reference.SECTIONS)
def test_the_readme_shows_the_records(section):
    text = (ROOT / "README.md").read_text()
    shown = text.split(reference.BEGIN.format(section))[1].split(reference.END.format(section))[0]
    expected = reference.SECTIONS[section](KEPT)
    assert shown.strip() == expected.strip(), "run `make reference`"


def test_the_records_hold_no_absolute_path_and_no_image():
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
    unfinished = results / "runs" / "unfinished"
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
    copied = sorted(str(p.relative_to(kept)) for p in kept.rglob("*.json"))
    assert copied == [
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
    reference.update(readme, "runs", "new")
    assert readme.read_text() == f"a\n{begin}\nnew\n{end}\nb\n"
    reference.update(readme, "runs", "new")
    assert readme.read_text() == f"a\n{begin}\nnew\n{end}\nb\n"


def benchmark_record(folder, name: str, values: dict[str, float], **more) -> None:
    record = {
        **values,
        "targets": dict.fromkeys(values, 1.0),
        "model": {"name": "custom_cnn", "pixels": 48, "multiply_adds": 142e6},
        "batch": 128,
        "images": 1000,
        "rounds": {},
        "hardware": {"processor": "Nimble", "cores": 2},
        "versions": {"torch": "2", "ray": "3"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**record, **more}))


def test_models_preparation_and_sweeps_have_separate_tables(tmp_path):
    folder = tmp_path / "benchmarks"
    rounds = {"train": [1.0] * 5, "train_plain": [1.0] * 5}
    benchmark_record(folder, "custom_cnn", {"train_over_plain": 0.9}, rounds=rounds)
    rounds = {"prepare": [4.0] * 3, "prepare_plain": [1.0] * 3, "prepare_few": [1.0]}
    limit = {"prepare_limit_over_pillow": 7.25}
    benchmark_record(folder, "preparation", {"prepare_over_pillow": 5.5}, rounds=rounds, **limit)
    benchmark_record(folder, "sweeps", {"asha_saving": 0.3, "asha_loss": 0.01}, asha={})
    models, preparation, sweeps = reference.benchmarks(tmp_path).split("\n\n| number")
    assert "`custom_cnn`, 48 px" in models.splitlines()[0] and "asha" not in models
    assert "| `train_over_plain` | ≥ 0.95 | 0.90 (missed) |" in models
    assert "| `stream_over_naive` | ≥ 2 | not measured |" in models
    conditions = (
        "`custom_cnn`, 48 px: batch size 128, 1,000 images, 5 rounds of each series; "
        "Nimble, 2 cores; torch 2, ray 3."
    )
    assert models.splitlines()[-1] == conditions
    assert "| `prepare_over_pillow` | ≥ 5 | 5.50 |" in preparation
    assert "preparation: 1,000 images, 1 or 3 rounds of each series; Nimble, 2 cores" in preparation
    assert preparation.endswith(targets.PREPARATION_LIMIT.format(7.25))
    assert "| `asha_saving` | ≤ 0.4 | 0.30 |" in sweeps and "0.01 (missed)" in sweeps
    conditions = "sweeps: measured once; Nimble, 2 cores; torch 2, ray 3."
    assert sweeps.splitlines()[-1] == conditions
