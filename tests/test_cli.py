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


def test_a_value_that_is_missing_after_an_equals_sign_is_named(capsys):
    parser = cli.JobParser(prog="x.py")
    parser.add_argument("--output", default="here")
    parser.add_argument("--split", nargs="+")
    assert parser.parse_args(["--output", "there"]).output == "there"
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--output=--"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "x.py: --output: a value is missing\n"


def test_control_characters_are_escaped_where_they_are_printed(capsys):
    def main():
        cli.log("one\x1b[2J\ntwo\udcff é 😀")
        raise UserError("--run: 'a\x07\u202eb'")

    with pytest.raises(SystemExit):
        cli.run(main)
    printed = capsys.readouterr()
    assert printed.out == "one\\x1b[2J\ntwo\\udcff é 😀\n"
    assert printed.err.endswith(": --run: 'a\\x07\\u202eb'\n")
