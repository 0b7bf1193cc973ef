from pathlib import Path

import pytest

from tinyspan import StorageError
from tinyspan.io.journals import append_line, cut_lines, read_lines


def test_a_journal_tells_damage_from_an_interrupted_write(tmp_path: Path) -> None:
    path, link = tmp_path / "j.jsonl", "whose"
    for step in range(3):
        link = append_line(path, link, {"step": step})
    whole = path.read_bytes()
    assert read_lines(path, "whose") == ([{"step": 0}, {"step": 1}, {"step": 2}], link)
    for length in range(len(whole)):  # killed while it wrote: whole lines stay
        path.write_bytes(whole[:length])
        assert read_lines(path, "whose")[0] == [{"step": i} for i in range(whole[:length].count(b"\n"))]
    for place in range(len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(StorageError, match="damaged"):
            read_lines(path, "whose")
    path.write_bytes(whole)
    with pytest.raises(StorageError, match="in line 1"):
        read_lines(path, "somebody else's")
    path.write_bytes(whole + b'{"ste')
    cut_lines(path, 0)
    assert path.read_bytes() == whole
    for last, left in ((1, 2), (2, 0), (1, 0)):
        cut_lines(path, last)
        assert read_lines(path, "whose")[0] == [{"step": i} for i in range(left)]
    cut_lines(tmp_path / "none", 1)
    assert read_lines(tmp_path / "none", "whose") == ([], "whose")
