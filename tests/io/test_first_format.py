"""Folders written before block files could name the kind of their map: see `data/first_format/README.md`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinyspan import Basis, Partition, SubspaceModel, Trajectory, by_pattern, random_basis
from tinyspan.model.opened_adapter import OpenedAdapter

HOME = Path(__file__).parents[1] / "data" / "first_format"
EXPECTED: dict[str, Any] = json.loads((HOME / "expected.json").read_text())


def fresh_model() -> nn.Module:
    """theta_0 of the folders; its weights are multiples of 1/16, the same on every processor."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            values = torch.arange(parameter.numel()) * (index + 3) % 17 - 8
            parameter.copy_((values / 16).view(parameter.shape))
    return model


def close(found: dict[str, Tensor], expected: dict[str, list[float]]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, torch.tensor(expected[name]), rtol=1e-5, atol=1e-6)


def test_a_trajectory_is_read() -> None:
    trajectory, expected = Trajectory(HOME / "trajectory"), EXPECTED["trajectory"]
    assert (trajectory.content_hash(), trajectory.steps) == (expected["content_hash"], expected["steps"])
    close({block.name: trajectory.delta(block) for block in trajectory.partition}, expected["last"])


@pytest.mark.parametrize("name", EXPECTED["bases"])
def test_a_basis_of_every_kind_of_map_is_read_and_written_as_before(name: str, tmp_path: Path) -> None:
    """Another content hash would part the adapters that name the basis from it."""
    basis, expected = Basis.from_pretrained(HOME / "bases" / name), EXPECTED["bases"][name]
    assert (basis.content_hash(), basis.ranks) == (expected["content_hash"], expected["ranks"])
    close(basis.matvec({block: torch.arange(1.0, rank + 1) for block, rank in basis.ranks.items()}), expected["V z"])
    g = {block.name: (torch.arange(block.numel) % 3).float() for block in basis.partition}
    close(basis.rmatvec(g), expected["V^T g"])
    basis.write(tmp_path / "copy")
    assert Basis.from_pretrained(tmp_path / "copy").content_hash() == expected["content_hash"]


def draws_the_same(partition: Partition) -> bool:
    """Whether this torch on this processor draws and orthonormalises numbers to the bit as where the folders are from.

    It is asked of the numbers alone, not of hashes, so that a change of these is noticed everywhere.
    """
    stored = Basis.from_pretrained(HOME / "bases" / "random")
    redrawn = random_basis(partition, 2, seed=3)
    return all(
        torch.equal(*(basis.maps[block.name].tensors()["directions"] for basis in (stored, redrawn)))
        for block in partition
    )


@pytest.mark.parametrize("name", EXPECTED["adapters"])
def test_an_adapter_of_every_kind_of_basis_is_read(name: str) -> None:
    partition = by_pattern(fresh_model(), {"first": r"0\..*", "second": r"2\.weight"})
    if name.startswith("drawn-random") and not draws_the_same(partition):
        pytest.skip("this torch or processor draws other numbers")
    folder, expected = HOME / "adapters" / name, EXPECTED["adapters"][name]
    assert OpenedAdapter(folder).basis().content_hash() == expected["basis"]
    subspace = SubspaceModel.from_pretrained(fresh_model(), folder)
    torch.testing.assert_close(subspace(torch.tensor(EXPECTED["inputs"])), torch.tensor(expected["outputs"]))
