"""Names from data as parts of file names, and files that are whole or not there."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import run_python
from tests.names import NAMES
from tract_det.errors import UserError, brief, shortened
from tract_det.files import (
    atomically,
    file_name_part,
    read_metrics,
    remove_abandoned,
    steps_and_values,
)


def test_ordinary_names_stay_as_they_are():
    for name in ("car", "tvmonitor", "traffic light", "Fußgänger", "v1.2-x_y", "猫"):
        assert file_name_part(name) == shortened(name) == name


@given(st.text() | st.sampled_from(["\x1b[2J", "a\ud800", "a\r\u2028b", "\u067e\u200c\u0622"]))
def test_a_message_can_be_printed_and_steers_no_terminal(name):
    message = str(UserError(f"{name}: correct it"))
    message.encode()
    assert message.splitlines() == message.split("\n") and "\x1b" not in message
    assert len(message) == len(name) + len(": correct it")
    assert str(UserError("\u067e\u200c\u0622")) == "\u067e\u200c\u0622"  # a Persian word's joiner


def test_a_value_is_brief_however_long_or_deep_it_is():
    endless = value = [1]
    for _ in range(40):
        value = [value] * 9
    endless.append(endless)
    for strange in (value, endless, 10**9999, "x" * 9999, {"a": [b"\n" * 500]}, float("nan")):
        assert len(brief(strange)) <= 100 and brief(strange).isprintable()
    assert brief({"id": 7, "name": "a"}) == "{'id': 7, 'name': 'a'}"


@given(st.text() | st.sampled_from(NAMES))
def test_a_part_of_a_file_name_is_never_a_path(name):
    part = file_name_part(name)
    assert Path(f"a_{part}.txt").name == f"a_{part}.txt" and part not in ("", ".", "..")
    assert len(part.encode()) <= 150 and part.isprintable()
    assert len(shortened(name)) <= 40 and shortened(name).isprintable()


@given(st.text(), st.text())
def test_different_names_have_different_files(one, other):
    assert (file_name_part(one) == file_name_part(other)) == (one == other)


def test_so_have_names_that_differ_at_their_end_or_in_an_escape():
    assert len({file_name_part(name) for name in NAMES}) == len(NAMES)


def test_a_file_whose_writer_was_killed_is_removed_and_one_in_the_making_is_not(tmp_path):
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from tract_det.files import atomically\n"
        "def write(path):\n"
        "    path.write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
        "atomically(Path(sys.argv[1]), write)\n"
    )
    for name in ("model.pth", "detections/a.b.txt", "without_suffix"):
        assert run_python("-c", program, tmp_path / name).returncode == -9
    (tmp_path / ".hidden.1.txt").write_text("a user's own")
    assert len(files_in(tmp_path)) == 4

    def start_of_another(path):
        path.write_text("whole")
        remove_abandoned(tmp_path)

    atomically(tmp_path / "results.json", start_of_another)
    assert files_in(tmp_path) == {".hidden.1.txt", "results.json"}
    remove_abandoned(tmp_path / "no_such_folder")


def files_in(folder):
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_a_curve_has_the_steps_whose_figure_is_a_number(tmp_path):
    """For the report and for `visualize`: both draw the same points."""
    lines = ['{"iteration": 1, "loss": 2.5}', '{"iteration": 2, "top1": null}']
    lines += ['{"iteration": 2, "loss": null}', '{"iteration": 3, "loss": 1, "top1": 40.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert steps_and_values(entries, "loss") == ([1, 3], [2.5, 1])
    assert steps_and_values(entries, "top1") == ([3], [40.0])
    assert steps_and_values(entries, "lr") == ([], [])
