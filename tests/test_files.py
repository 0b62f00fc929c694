"""Names from data as parts of file names."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.names import NAMES
from tract_det.errors import shortened
from tract_det.files import file_name_part


def test_ordinary_names_stay_as_they_are():
    for name in ("car", "tvmonitor", "traffic light", "Fußgänger", "v1.2-x_y", "猫"):
        assert file_name_part(name) == shortened(name) == name


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
