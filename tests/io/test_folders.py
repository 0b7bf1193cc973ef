"""Output folders: refused, claimed, and opened again after an interruption."""

import os
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tinyspan import InputError, TinyspanError
from tinyspan.io.folders import (
    Busy,
    begin,
    check_folder,
    claimed,
    end,
    first_difference,
    is_unfinished,
    prepare_folder,
    resumable,
)
from tinyspan.io.storage import sweep


def test_output_folders(tmp_path: Path) -> None:
    out, ours = tmp_path / "a" / "b", "trajectory"
    prepare_folder(out, ours)
    prepare_folder(out, ours)  # an empty one is fine
    (out / "points").mkdir()
    for name in ("manifest.json", "start.safetensors", ".manifest.json.x1", "points/1"):
        (out / name).write_text("{}")
    with pytest.raises(InputError, match="overwrite=True"):
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


def test_a_folder_that_somebody_looked_at_on_macos(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "out"):
        folder.mkdir(exist_ok=True)
        (folder / ".DS_Store").write_bytes(b"\0")
    prepare_folder(tmp_path / "out", "basis")  # as an empty one
    (tmp_path / "out/manifest.json").write_text("{}")
    (tmp_path / "out/.DS_Store").write_bytes(b"\0")
    prepare_folder(tmp_path / "out", "basis", overwrite=True)
    begin(tmp_path / "out", "basis", {})
    (tmp_path / "out/.DS_Store").write_bytes(b"\0")
    assert begin(tmp_path / "out", "basis", {}) is True


def test_unfinished_work_resumes_only_with_its_own_settings(tmp_path: Path) -> None:
    out, settings = tmp_path / "out", {"task": "sst2", "settings": {"rate": 0.1, "sizes": (1, 2)}}
    assert begin(out, "adapter", settings) is False
    assert begin(out, "adapter", settings) is True
    assert begin(out, "adapter", settings, overwrite=True) is True  # the same command goes on, `overwrite` and all
    (out / "unfinished/state").write_text("kept")
    (out / "adapter.safetensors").write_text("kept")
    other = {"task": "sst2", "settings": {"rate": 0.2, "sizes": (1, 2)}}
    with pytest.raises(InputError, match=r"settings\.rate 0\.1, where this has 0\.2"):
        begin(out, "adapter", other)
    with pytest.raises(InputError, match="unfinished work"):
        prepare_folder(out, "adapter")
    with pytest.raises(InputError, match="holds something else"):
        begin(out, "basis", settings, overwrite=True)
    assert (out / "unfinished/state").read_text() == "kept"
    assert begin(out, "adapter", other, overwrite=True) is False
    assert sorted(path.name for path in out.iterdir()) == [".tinyspan", "unfinished"]
    assert [path.name for path in (out / "unfinished").iterdir()] == ["recipe.json"]
    (out / "result.json").write_text("{}")
    end(out)
    assert not is_unfinished(out)
    with pytest.raises(InputError, match="earlier output"):
        begin(out, "adapter", other)


@pytest.mark.parametrize(
    ("stored", "current", "difference"),
    [
        ({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 2}}, "b.d 3, where this has None"),
        ({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2, "d": 3}}, "b.d None, where this has 3"),
        ({"a": 1, "b": 2}, {"a": 1}, "b 2, where this has None"),
        ({"a": 1, "b": [1, 2]}, {"b": (1, 2), "a": 1}, None),
    ],
)
def test_settings_are_compared_by_the_keys_of_both(stored: Any, current: Any, difference: str | None) -> None:
    assert first_difference(stored, current) == difference


def test_an_overwritten_output_loses_its_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill at any moment leaves no manifest whose files are gone."""
    names = ["start.safetensors", "points.jsonl", "manifest.json", "result.json", "predictions.jsonl"]
    prepare_folder(tmp_path / "out", "trajectory")
    for name in names:
        (tmp_path / "out" / name).write_text("{}")
    unlink, removed = Path.unlink, list[str]()

    def noted(path: Path, *arguments: Any) -> None:
        removed.append(path.name)
        unlink(path, *arguments)

    monkeypatch.setattr(Path, "unlink", noted)
    prepare_folder(tmp_path / "out", "trajectory", overwrite=True)
    assert removed[0] == "manifest.json"
    assert sorted(removed) == sorted(names)


def test_damaged_settings_do_not_match(tmp_path: Path) -> None:
    begin(tmp_path / "out", "adapter", {"a": 1})
    (tmp_path / "out/unfinished/recipe.json").write_text("{")
    with pytest.raises(InputError, match="damaged settings"):
        begin(tmp_path / "out", "adapter", {"a": 1})
    assert begin(tmp_path / "out", "adapter", {"a": 1}, overwrite=True) is False


@pytest.mark.processes
def test_a_second_process_is_told_who_holds_the_folder(
    held: Callable[[Path], AbstractContextManager["subprocess.Popen[bytes]"]], tmp_path: Path
) -> None:
    with held(tmp_path) as holder, pytest.raises(Busy, match=rf"by process {holder.pid} on .* since 20"):
        claimed(tmp_path).__enter__()
    with claimed(tmp_path), claimed(tmp_path):  # a killed process holds nothing; one process may claim twice
        assert f"process {os.getpid()} " in (tmp_path / ".holder").read_text()
    assert not (tmp_path / ".holder").exists()


def test_the_holder_is_told_by_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for first in ("/some/where/bin/tinyspan", "/some/where/tinyspan/__main__.py"):
        monkeypatch.setattr("sys.argv", [first, "record", "a b"])
        with claimed(tmp_path):
            assert (tmp_path / ".holder").read_text().endswith("(tinyspan record 'a b')\n")


def test_what_only_looks_like_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "drafts/unfinished").mkdir(parents=True)
    (tmp_path / "drafts/unfinished/novel.txt").write_text("years of work")
    with pytest.raises(InputError, match="something else"), resumable(tmp_path / "drafts", "basis", {}):
        pass
    assert (tmp_path / "drafts/unfinished/novel.txt").is_file()
    for name in (".env.template", ".eslintrc.override"):
        (tmp_path / name).write_text("mine")
    (tmp_path / ".a.tinyspan-tmp").mkdir()
    (tmp_path / ".b.x.tinyspan-tmp").write_text("killed")
    (tmp_path / ".tmpw89Mz0").write_text("killed in safetensors")
    sweep(tmp_path)
    names = [".a.tinyspan-tmp", ".env.template", ".eslintrc.override", "drafts"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_what_a_process_left_that_was_killed_in_safetensors_is_no_hindrance(tmp_path: Path) -> None:
    """It writes a file of its own, which it renames to ours."""
    begin(tmp_path / "out", "basis", {"a": 1})
    for place in (tmp_path / "out", tmp_path / "out/unfinished"):
        (place / ".tmpw89Mz0").write_text("half")
    assert begin(tmp_path / "out", "basis", {"a": 1}) is True
    assert not list((tmp_path / "out").rglob(".tmp*"))


def test_a_failure_keeps_what_one_can_go_on_from(tmp_path: Path) -> None:
    def fail(state: str | None) -> None:
        with resumable(tmp_path / "a", "adapter", {}):
            if state is not None:
                (tmp_path / "a/unfinished" / state).mkdir()
            raise TinyspanError("sick")

    for state in (None, "checkpoint-4", None):  # before anything was done, later, and at once when it went on
        assert (tmp_path / "a").exists() is False or (tmp_path / "a/unfinished/checkpoint-4").is_dir()
        with pytest.raises(TinyspanError, match="sick"):
            fail(state)
    assert (tmp_path / "a/unfinished/checkpoint-4").is_dir()
