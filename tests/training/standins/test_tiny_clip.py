"""The tiny CLIP's script."""

import sys

import pytest

from training.standins import tiny_clip


def test_a_file_in_place_of_the_folder_is_one_line(monkeypatch, tmp_path):
    path = tmp_path / "clip"
    path.write_text("mine")
    monkeypatch.setattr(sys, "argv", ["tiny_clip.py", "--output_dir", str(path)])
    with pytest.raises(SystemExit, match=r"^error: .*File exists") as end:
        tiny_clip.main()
    assert "\n" not in str(end.value) and path.read_text() == "mine"
