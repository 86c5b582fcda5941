"""Files and folders that replace others when they are complete."""

import pytest

from torchlmoe.files import replacing


def write(path, content):
    with replacing(path, "The text", "make room") as partial:
        partial.write_text(content)


def cut_off(path):
    path.write_text("half of the sec")
    raise KeyboardInterrupt


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    path = tmp_path / "text"
    write(path, "first")
    with pytest.raises(KeyboardInterrupt), replacing(path, "The text", "make room") as partial:
        cut_off(partial)
    assert path.read_text() == "first"
    (tmp_path / "text.partial").mkdir()  # of a killed process
    write(path, "second")
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    folder = tmp_path / "folder"
    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "folder.partial" / "of_a_killed_process").touch()
    with replacing(folder, "The folder", "make room") as partial:
        partial.mkdir()
        (partial / "file").touch()
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert list(tmp_path.iterdir()) == [folder]


def test_an_error_names_the_path(tmp_path):
    missing = tmp_path / "none" / "text"
    with pytest.raises(
        OSError, match=rf"^The text could not be written to {missing}: No such file or .*; make room\.$"
    ):
        write(missing, "text")
