"""In one process, with stand-ins for what `fully_shard` makes; tests/interop/test_sharded.py has the real ones."""

import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from towers import Tower

from tinyspan import InputError, by_layer, by_pattern
from tinyspan.sharding import is_cut, is_sharded, local, require_visible, reshard


class Placement:
    def __init__(self, shards: bool) -> None:
        self.shards = shards

    def is_shard(self) -> bool:
        return self.shards

    def __repr__(self) -> str:
        return "Shard" if self.shards else "Replicate"


class Distributed(Tensor):
    """A parameter of which this process has the first two numbers."""

    placements = (Placement(True),)

    def to_local(self) -> Tensor:
        return self.as_subclass(Tensor)[:2]


class Replicated(Distributed):
    placements = (Placement(True), Placement(False))


class Cut(nn.Linear):
    """A module to which `fully_shard` was applied."""

    def reshard(self) -> None:
        self.freed = True


def test_local_is_the_shard_of_this_process() -> None:
    whole = nn.Parameter(torch.arange(5.0))
    assert local(whole) is whole
    assert not is_sharded(whole)
    sharded = torch.arange(5.0).as_subclass(Distributed).requires_grad_()
    assert is_sharded(sharded)
    part = local(sharded)
    assert part.tolist() == [0, 1]
    assert not part.requires_grad
    assert part.data_ptr() == sharded.data_ptr()


def test_copies_in_several_processes_are_refused() -> None:
    message = (
        "a parameter is distributed over the processes as (Shard, Replicate): expected every process to hold its "
        "own shard; use fully_shard on a one-dimensional mesh"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        local(torch.arange(5.0).as_subclass(Replicated))


def test_weights_that_deepspeed_or_fsdp1_hides_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tower()
    require_visible(model)
    with monkeypatch.context() as patch:
        patch.setattr(model.head.weight, "ds_id", 0, raising=False)  # as ZeRO-3 marks its parameters
        with pytest.raises(InputError, match=r"ZeRO-3 or FSDP1 .* expected one process, DDP or fully_shard"):
            by_layer(model)
    by_layer(model)
    from torch.distributed.fsdp import FullyShardedDataParallel

    monkeypatch.setattr(FullyShardedDataParallel, "__init__", nn.Module.__init__)  # which needs a process group
    model.layers[0].inner = FullyShardedDataParallel()  # type: ignore[call-arg]
    with pytest.raises(InputError, match="FSDP1"):
        require_visible(model)


def test_gathered_models_are_cut_too_and_can_be_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, gathered = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), Cut(2, 2))
    monkeypatch.delitem(sys.modules, "torch.distributed.fsdp", raising=False)
    assert not is_cut(gathered)
    assert "torch.distributed.fsdp" not in sys.modules
    module: Any = SimpleNamespace(FSDPModule=Cut)
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", module)
    assert is_cut(gathered) is True
    assert is_cut(plain) is False
    reshard(plain)
    reshard(gathered)
    assert gathered[1].freed
    plain[0].register_parameter("more", nn.Parameter(torch.zeros(5).as_subclass(Distributed), requires_grad=False))
    assert is_cut(plain)


def test_selected_weights_are_the_shards_and_not_what_a_forward_pass_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Cut(2, 2, bias=False))
    partition, shard = by_pattern(model, {"all": ".*"}), model[0].weight
    model[0].weight = nn.Parameter(torch.zeros(2, 2))
    monkeypatch.setattr(Cut, "reshard", lambda module: setattr(module, "weight", shard))
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", SimpleNamespace(FSDPModule=Cut))
    assert partition.select(model)["0.weight"] is shard
