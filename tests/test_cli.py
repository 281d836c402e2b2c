import pytest

from fer_ray import cli
from fer_ray.errors import JobFailed, UserError, unknown


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (UserError("--run: wrong"), 2, "--run: wrong"),
        (JobFailed("lost\nmore"), 1, "lost"),
        (FileNotFoundError(2, "No such file", "/x"), 1, "No such file"),
        (OSError(), 1, "OSError()"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command to resume"),
    ],
)
def test_what_is_no_defect_ends_in_one_line_and_a_status(raised, status, message, capsys):
    def main():
        raise raised

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_defects_keep_their_traceback():
    def main():
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        cli.run(main)


def test_integers_keep_to_their_bounds():
    assert cli.integer(1, 3)("2") == 2
    for text in ("0", "4", "2.5", "two", ""):
        with pytest.raises(Exception, match="is not a whole number between 1 and 3"):
            cli.integer(1, 3)(text)


def test_the_nearest_name_is_offered():
    assert "did you mean 'minmax'" in str(unknown("--x", "minmx", ["none", "minmax"]))
    assert "did you mean" not in str(unknown("--x", "zzz", ["none", "minmax"]))
