"""What `state_dict` holds is taken by a SubspaceModel of the same basis and base model alone."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainer import ROWS, Classifier, arguments
from torch import Tensor, nn
from towers import Tower

from tinyspan import (
    Basis,
    MismatchError,
    Partition,
    SubspaceModel,
    by_layer,
    empty_basis,
    fastfood_basis,
    random_basis,
    whole_model,
)
from tinyspan.interop.trainer import SubspaceTrainer


def drawn(seed: int = 0, **options: Any) -> Basis:
    return random_basis(by_layer(Tower()), 3, seed=seed, dtype=torch.float64, **options)


def built(model: nn.Module | None = None, basis: Basis | None = None, **options: Any) -> SubspaceModel:
    return SubspaceModel(model or Tower(), basis or drawn(), **{"modules_to_save": ["head"], **options})


def given(sign: float) -> Basis:
    partition = by_layer(Tower())
    return Basis.from_directions(
        partition, {block.name: sign * torch.ones(1, block.numel).double() for block in partition}
    )


def changed_head() -> Tower:
    model = Tower()
    with torch.no_grad():
        model.head.bias += 1
    return model


def changed_embedding() -> Tower:
    model = Tower()
    with torch.no_grad():
        model.embedding.weight[3, 1] += 1e-9
    return model


def whole_fastfood(seed: int = 0) -> Basis:
    return fastfood_basis(whole_model(Tower()), 6, seed=seed)


Make = Callable[[], SubspaceModel]
OTHERS: dict[str, tuple[Make, Make, str]] = {
    "random": (built, lambda: built(basis=drawn(seed=1)), "another basis"),
    "sparse": (built, lambda: built(basis=drawn(density=0.5)), "another basis"),
    "given": (lambda: built(basis=given(1.0)), lambda: built(basis=given(-1.0)), "another basis"),
    "fastfood": (lambda: built(basis=whole_fastfood()), lambda: built(basis=whole_fastfood(1)), "another basis"),
    "theta_0": (built, lambda: built(Tower(seed=1)), r"another theta_0, in block 'layers\.0'"),
    "frozen": (built, lambda: built(changed_embedding()), "another theta_0, in block 'frozen parameters'"),
    "no directions": (
        lambda: built(basis=empty_basis(by_layer(Tower()))),
        lambda: built(Tower(seed=1), empty_basis(by_layer(Tower()))),
        "another theta_0",
    ),
    "modules": (built, lambda: built(modules_to_save=["head", "embedding"]), "other modules_to_save, ensemble or"),
    "ensemble": (built, lambda: built(ensemble=2), "other modules_to_save, ensemble or"),
    "scales": (built, lambda: built(layer_scales=by_layer(Tower())), "other modules_to_save, ensemble or layer_scales"),
    "order of scales": (
        lambda: built(layer_scales=by_layer(Tower())),
        lambda: built(layer_scales=Partition(tuple(reversed(by_layer(Tower()).blocks)))),
        "other modules_to_save, ensemble or layer_scales",
    ),
    "blocks": (built, lambda: built(basis=random_basis(whole_model(Tower()), 3)), "another basis"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("difference", list(OTHERS))
def test_the_state_of_another_one_is_refused_before_anything_is_loaded(
    difference: str, strict: bool, tokens: Tensor, tmp_path: Path
) -> None:
    make, make_other, message = OTHERS[difference]
    trained, other = make(), make_other()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.1
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    before = other(tokens).detach()
    with pytest.raises(MismatchError, match=f"the state was saved with {message}"):
        other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=strict)
    assert torch.equal(other(tokens), before)
    again = make()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=strict)
    assert torch.equal(again(tokens), trained(tokens))


def test_what_is_trained_may_have_started_elsewhere(tokens: Tensor) -> None:
    trained, other = built(), built(changed_head())
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other(tokens), trained(tokens))


@pytest.mark.parametrize("options", [{}, {"layer_scales": by_layer(Tower())}])
def test_a_state_may_be_assigned(tokens: Tensor, options: dict[str, Any]) -> None:
    """Then z is another parameter, which the weights follow from then on."""
    trained, other = built(init_std=0.3, **options), built(**options)
    other(tokens).sum().backward()
    other.load_state_dict(trained.state_dict(), assign=True)
    for subspace in (trained, other):
        subspace.zero_grad()
        subspace(tokens).square().sum().backward()
    assert torch.equal(other(tokens), trained(tokens))
    for name, parameter in other.named_parameters():
        expected = trained.get_parameter(name)
        assert torch.equal(parameter, expected)
        assert (parameter.grad is None) == (expected.grad is None)
        assert parameter.grad is None or torch.equal(parameter.grad, expected.grad)


def test_the_weights_follow_z_after_an_assignment_that_failed(tokens: Tensor) -> None:
    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError

    subspace = built()
    subspace(tokens)
    subspace.model.register_load_state_dict_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        subspace.load_state_dict(built().state_dict(), assign=True)
    subspace(tokens).sum().backward()
    assert all(z.grad is not None for z in subspace.z)


def test_the_state_survives_copies_moves_and_a_saved_basis(tokens: Tensor, tmp_path: Path) -> None:
    trained = built(init_std=0.3)
    state = trained.state_dict()
    drawn().save_pretrained(tmp_path / "basis")
    basis = Basis.from_pretrained(tmp_path / "basis")
    for other in (copy.deepcopy(built()), pickle.loads(pickle.dumps(built())), built(basis=basis), built().double()):
        other.load_state_dict(state, strict=True)
        assert torch.equal(other(tokens), trained(tokens))
    state["_extra_state"] = state["_extra_state"].double()  # as one who averages states does
    built().load_state_dict(state)


def test_a_state_inside_another_module(tokens: Tensor) -> None:
    around, other = nn.ModuleDict({"inner": built()}), nn.ModuleDict({"inner": built(basis=drawn(seed=1))})
    with pytest.raises(MismatchError, match="another basis"):
        other.load_state_dict(around.state_dict())
    around.load_state_dict(around.state_dict())


def test_a_state_of_an_earlier_version_is_taken_with_a_warning(tokens: Tensor) -> None:
    trained, other = built(init_std=0.3), built()
    state = trained.state_dict()
    del state["_extra_state"]
    with pytest.warns(UserWarning, match="does not identify the basis and base model"):
        assert not any(other.load_state_dict(state, strict=True))
    assert torch.equal(other(tokens), trained(tokens))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict({"model.head.bias": torch.zeros(2).double()}, strict=False)  # without z


def test_what_reads_into_a_state_does_not_change_the_identity() -> None:
    """As torch.distributed.checkpoint does."""
    other = built(basis=drawn(seed=1))
    target = other.state_dict()
    for name, value in built().state_dict().items():
        target[name].copy_(value)
    with pytest.raises(MismatchError, match="another basis"):
        other.load_state_dict(target)


@pytest.mark.parametrize("difference", ["basis", "theta_0"])
def test_the_trainer_resumes_neither_in_another_basis_nor_over_another_model(difference: str, tmp_path: Path) -> None:
    def trainer(changed: str = "") -> SubspaceTrainer:
        model = Classifier().float()
        if changed == "theta_0":
            with torch.no_grad():
                model.layers[1].inner.bias += 1e-3
        basis = random_basis(by_layer(model), 3, seed=int(changed == "basis"))
        subspace = SubspaceModel(model, basis, modules_to_save=["head"])
        return SubspaceTrainer(subspace, arguments(tmp_path, save_strategy="epoch"), train_dataset=ROWS)

    trainer().train()
    other = trainer(difference)
    before = [z.detach().clone() for z in other.model.z]
    theta_0 = r"another theta_0: the model differs in block 'layers\.1'"
    expected = "trained in the basis" if difference == "basis" else theta_0
    with pytest.raises(MismatchError, match=expected):
        other.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(before, other.model.z, strict=True))
    trainer().train(resume_from_checkpoint=True)
