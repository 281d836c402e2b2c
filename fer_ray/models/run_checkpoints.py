"""Which checkpoint of a run to use: the best one or the latest, passing over damaged ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from fer_ray import storage
from fer_ray.data.run_folder import RunFolder
from fer_ray.errors import UserError, first_line
from fer_ray.models.checkpoint import INDEX, MODEL, SCORE, TRAINING, Checkpoint, read


def find(
    path: str, *, allow_fallback: bool = False, log: Callable[[str], None] = print
) -> Checkpoint:
    """The checkpoint of a path: the folder itself, or the best one of a run's folder.

    Of equally good ones it is the latest. Its weights have been read and are undamaged.

    Args:
        path: local path or URI of a checkpoint or of a run.
        allow_fallback: whether a run whose best checkpoint is damaged, or may be the damaged one,
            stands for the best of the others.
        log: receives a line where that is done.

    Raises:
        UserError: where there is no undamaged checkpoint, or only with `allow_fallback`.
    """
    path = storage.absolute(path)
    if not storage.is_directory(path):
        raise UserError(f"{path}: no checkpoint: the folder does not exist")
    if storage.exists(storage.join(path, INDEX)):
        single = read(path)
        single.load_tensors(MODEL)
        return single
    problems: list[str] = []
    ranked = sorted(
        _readable(path, problems),
        key=lambda kept: (kept.score, kept.epoch, kept.path),
        reverse=True,
    )
    best = _first_undamaged(ranked, (MODEL,), problems)
    if best is None and problems:
        raise UserError(f"{path}: no checkpoint can be used: {problems[0]}")
    if best is None:
        raise UserError(f"{path}: no checkpoint: give the folder of a checkpoint or of a run")
    try:
        recorded = RunFolder(path).best_checkpoint
        if recorded == (best.path, best.sha256):
            problems.clear()  # the damaged ones are not the best
        elif recorded and not problems:
            problems.append(f"{path}: the best checkpoint is not the one that its result records")
    except UserError as error:
        problems.append(str(error))
    if problems and not allow_fallback:
        raise UserError(
            f"{problems[0]}; to use {storage.name_of(best.path)} instead (epoch {best.epoch}, "
            f"{SCORE} {best.score:.4f}), give --allow-fallback"
        )
    if problems:
        log(f"warning: {problems[0]}; using {storage.name_of(best.path)} instead")
    return best


def latest(path: str, *, log: Callable[[str], None] | None = None) -> Checkpoint | None:
    """The latest undamaged checkpoint of a run, from which it resumes; None where there is none.

    Args:
        path: the run's folder.
        log: optional; receives a line for each damaged checkpoint that is passed over.
    """
    problems: list[str] = []
    ranked = sorted(
        _readable(path, problems), key=lambda kept: (kept.epoch, kept.path), reverse=True
    )
    last = _first_undamaged(ranked, (MODEL, TRAINING), problems)
    if log:
        for problem in problems:
            log(f"warning: passing over a checkpoint: {problem}")
    return last


def in_run(path: str) -> list[Checkpoint]:
    """The checkpoints of a run's folder; those with a damaged index are passed over."""
    return _readable(path, [])


def _readable(path: str, problems: list[str]) -> list[Checkpoint]:
    """The checkpoints of a run whose index is undamaged; adds to `problems` those of the others."""
    checkpoints = []
    for folder in RunFolder(path).checkpoint_paths():
        with _noting(problems, folder):
            checkpoints.append(read(folder))
    return checkpoints


def _first_undamaged(
    candidates: Sequence[Checkpoint], names: Sequence[str], problems: list[str]
) -> Checkpoint | None:
    """The first whose tensor files are undamaged; adds to `problems` those before it."""
    for candidate in candidates:
        with _noting(problems, candidate.path):
            for name in names:
                candidate.load_tensors(name)
            return candidate
    return None


@contextlib.contextmanager
def _noting(problems: list[str], folder: str) -> Iterator[None]:
    """Passes over a checkpoint that cannot be used, and notes why."""
    try:
        yield
    except (UserError, FileNotFoundError) as error:
        # the training that is going on may have removed it meanwhile
        if storage.exists(storage.join(folder, INDEX)):
            problems.append(first_line(error))
