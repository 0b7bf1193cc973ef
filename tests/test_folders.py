"""Output folders: refused, claimed, and opened again after an interruption."""

import os
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tinyspan import InputError
from tinyspan.folders import Busy, begin, check_folder, claimed, end, is_unfinished, prepare_folder


def test_output_folders(tmp_path: Path) -> None:
    out, ours = tmp_path / "a" / "b", "trajectory"
    prepare_folder(out, ours)
    prepare_folder(out, ours)  # an empty one is fine
    (out / "points").mkdir()
    for name in ("manifest.json", "start.safetensors", ".manifest.json.x1", "points/1"):
        (out / name).write_text("{}")
    with pytest.raises(InputError, match="--overwrite"):
        prepare_folder(out, ours)
    (out / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"holds something else \(thesis\.tex\)"):
            prepare_folder(out, ours, overwrite)
    assert len(list(out.iterdir())) == 6
    (out / "thesis.tex").unlink()
    with pytest.raises(InputError, match="holds something else"):
        prepare_folder(out, "adapter", overwrite=True)
    with pytest.raises(InputError, match="is read and lies in"):
        check_folder(out, ours, True, inputs=[out / "points"])
    (tmp_path / "link").symlink_to(out)
    prepare_folder(tmp_path / "link", ours, overwrite=True)
    assert [path.name for path in out.iterdir()] == [".tinyspan"]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/model").mkdir()  # our names, but not our folder
    with pytest.raises(InputError, match="no tinyspan output"):
        prepare_folder(tmp_path / "theirs", ours, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        prepare_folder(tmp_path / "file", ours)


def test_unfinished_work_goes_on_only_with_its_own_recipe(tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", {"task": "sst2", "settings": {"rate": 0.1, "sizes": (1, 2)}}
    assert begin(out, "adapter", recipe) is False
    assert begin(out, "adapter", recipe) is True
    assert begin(out, "adapter", recipe, overwrite=True) is True  # the same command goes on, --overwrite and all
    (out / "unfinished/state").write_text("kept")
    (out / "adapter.safetensors").write_text("kept")
    other = {"task": "sst2", "settings": {"rate": 0.2, "sizes": (1, 2)}}
    with pytest.raises(InputError, match=r"settings\.rate 0\.1, where this has 0\.2"):
        begin(out, "adapter", other)
    with pytest.raises(InputError, match="unfinished work"):
        prepare_folder(out, "adapter")
    with pytest.raises(InputError, match="holds something else"):
        begin(out, "basis", recipe, overwrite=True)
    assert (out / "unfinished/state").read_text() == "kept"
    assert begin(out, "adapter", other, overwrite=True) is False
    assert sorted(path.name for path in out.iterdir()) == [".tinyspan", "unfinished"]
    assert [path.name for path in (out / "unfinished").iterdir()] == ["recipe.json"]
    (out / "result.json").write_text("{}")
    end(out)
    assert not is_unfinished(out)
    with pytest.raises(InputError, match="earlier output"):
        begin(out, "adapter", other)


def test_a_damaged_recipe_is_not_taken_for_the_same(tmp_path: Path) -> None:
    begin(tmp_path / "out", "adapter", {"a": 1})
    (tmp_path / "out/unfinished/recipe.json").write_text("{")
    with pytest.raises(InputError, match="damaged recipe"):
        begin(tmp_path / "out", "adapter", {"a": 1})
    assert begin(tmp_path / "out", "adapter", {"a": 1}, overwrite=True) is False


def test_a_second_process_is_told_who_holds_the_folder(
    held: Callable[[Path], AbstractContextManager["subprocess.Popen[bytes]"]], tmp_path: Path
) -> None:
    with held(tmp_path) as holder, pytest.raises(Busy, match=rf"by process {holder.pid} on .* since 20"):
        claimed(tmp_path).__enter__()
    with claimed(tmp_path), claimed(tmp_path):  # a killed process holds nothing; one process may claim twice
        assert f"process {os.getpid()} " in (tmp_path / ".holder").read_text()
    assert not (tmp_path / ".holder").exists()
