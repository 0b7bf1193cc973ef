import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tinyspan import StorageError, TinyspanError
from tinyspan.io import storage


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    storage.write_json(path, {"good": 1})
    with pytest.raises(TinyspanError, match="NaN or infinite"):
        storage.write_json(path, {"bad": float("nan")})
    assert storage.read_json(path) == {"good": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ["[]", "{", '{"a": NaN}', "[" * 100_000, "1" * 5_000, "\\ud800", '{"a": 1}'])
def test_bad_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(StorageError, match="damaged"):
        storage.read_json(tmp_path / "a.json")


def test_files_have_the_permissions_that_the_user_sets_for_new_ones(tmp_path: Path) -> None:
    code = "import os; os.umask(0o077); from pathlib import Path; from tinyspan.io.storage import write_json; "
    code += f"write_json(Path({str(tmp_path / 'private.json')!r}), {{}})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "private.json").stat().st_mode & 0o777 == 0o600


def test_every_flipped_bit_of_a_json_file_is_noticed(tmp_path: Path) -> None:
    path, content = tmp_path / "a.json", {"score": 0.8125, "steps": [1, 23], "name": "sst2", "nested": {"b": None}}
    storage.write_json(path, content)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            with suppress(StorageError):
                assert storage.read_json(path) == content  # one white space for another


@pytest.mark.parametrize("content", [{"seed": 10**25}, {"name": "\ud800"}, {"long": "x" * (1 << 24)}])
def test_nothing_is_written_that_could_not_be_read(tmp_path: Path, content: dict[str, object]) -> None:
    with pytest.raises(TinyspanError, match="could not be read again"):
        storage.write_json(tmp_path / "a.json", content)
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    folder, link = tmp_path / "out [1]", tmp_path / "link"
    with suppress(ValueError), storage.replacing_folder(folder) as temporary:
        (temporary / "a").write_text("half")
        raise ValueError("stop")
    assert [*tmp_path.iterdir()] == []
    killed = tmp_path / f".out [1].x{storage.TEMPORARY}"  # of a process that was killed
    other = tmp_path / f".out 1.x{storage.TEMPORARY}"
    written = tmp_path / f".out [1].y{storage.TEMPORARY}"  # of one that is writing now
    for left in (killed, other, written):
        left.mkdir()
        (left / "a").write_text("half")
    os.utime(killed, (0, 0))
    with storage.replacing_folder(folder) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner/a").write_text("whole")
        assert not folder.exists()
    assert (folder / "inner/a").read_text() == "whole"
    assert sorted(tmp_path.iterdir()) == sorted([folder, other, written])
    assert folder.stat().st_mode == (folder / "inner").stat().st_mode
    with (
        pytest.raises(StorageError, match="could not be written: Directory not empty"),
        storage.replacing_folder(folder),
    ):
        pass  # nothing in it is overwritten
    assert (folder / "inner/a").read_text() == "whole"
    (tmp_path / "empty").mkdir()
    link.symlink_to("empty")
    with storage.replacing_folder(link) as temporary:
        (temporary / "a").write_text("whole")
    assert link.is_symlink()
    assert (tmp_path / "empty/a").read_text() == "whole"


def test_the_current_folder_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    number = tmp_path.stat().st_ino
    with storage.replacing_folder(Path()) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner/a").write_text("whole")
    assert (Path.cwd(), tmp_path.stat().st_ino) == (tmp_path, number)
    assert Path("inner/a").read_text() == "whole"
    assert [path.name for path in tmp_path.parent.glob(f".{tmp_path.name}.*")] == []


def test_a_folder_in_one_that_cannot_be_written_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a mount."""
    folder = tmp_path / "outer/out"
    folder.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder.parent)
    with storage.replacing_folder(folder) as temporary:
        assert temporary.parent == folder
        (temporary / "a").write_text("whole")
    assert [path.name for path in folder.iterdir()] == ["a"]
