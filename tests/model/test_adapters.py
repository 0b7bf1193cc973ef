"""Many adapters on one basis, under the names that PEFT gave these things."""

import copy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from towers import Checkpointed, Tower
from transformers import PretrainedConfig

from tinyspan import (
    Basis,
    InputError,
    MismatchError,
    Partition,
    StorageError,
    SubspaceModel,
    by_layer,
    by_pattern,
    random_basis,
)
from tinyspan.interop.deltas import export_delta
from tinyspan.interop.lora import export_lora
from tinyspan.labels import label_names
from tinyspan.maps.dense import DenseMap
from tinyspan.model.adapters import adapter_tensors, write_adapter
from tinyspan.model.base import require_same
from tinyspan.model.files import wrap_with_adapter
from tinyspan.model.opened_adapter import OpenedAdapter
from tinyspan.weights import follows_subspace


@pytest.fixture
def basis() -> Basis:
    return random_basis(by_layer(Tower()), 3, dtype=torch.float64)


Make = Callable[..., SubspaceModel]


@pytest.fixture
def trained(basis: Basis, tmp_path: Path) -> Make:
    """Train a little towards a target of its own, and save: `trained("a")` leaves the adapter tmp_path/a."""

    def make(name: str, ensemble: int = 1) -> SubspaceModel:
        subspace = SubspaceModel(Tower(), basis, modules_to_save=["head"], ensemble=ensemble)
        generator = torch.Generator().manual_seed(ord(name))
        with torch.no_grad():
            for parameter in subspace.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        subspace.save_pretrained(tmp_path / name)
        return subspace

    return make


def test_adapters_are_swapped_in_place_with_their_heads(
    trained: Make, basis: Basis, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: trained(name)(tokens).detach() for name in "abc"}
    subspace = SubspaceModel.from_pretrained(Tower(), tmp_path / "a")
    identity = [id(parameter) for parameter in subspace.parameters()]
    subspace.load_adapter(tmp_path / "b", adapter_name="b")
    subspace.load_adapter(tmp_path / "c", adapter_name="c")
    assert subspace.adapters == ["default", "b", "c"]
    reads = 0
    displace = DenseMap.displace

    def counted(self: DenseMap, *args: Tensor) -> None:
        nonlocal reads
        reads += self.directions.numel()
        displace(self, *args)

    for name in ("b", "c", "b", "default", "c"):
        assert torch.equal(
            subspace(tokens), expected[{"default": "a"}.get(subspace.active_adapter, subspace.active_adapter)]
        )
        subspace.set_adapter(name)
        assert subspace.active_adapter == name
        with monkeypatch.context() as patch:
            patch.setattr(DenseMap, "displace", counted)
            reads = 0
            assert torch.equal(subspace(tokens), expected["a" if name == "default" else name])
            assert reads == sum(v.directions.numel() for v in basis.maps.values())  # one read of the basis
    assert [id(parameter) for parameter in subspace.parameters()] == identity


def test_what_an_adapter_learns_is_kept_when_another_takes_over(trained: Make, tmp_path: Path, tokens: Tensor) -> None:
    for name in "ab":
        trained(name)
    subspace = SubspaceModel.from_pretrained(Tower(), tmp_path / "a")
    subspace.load_adapter(tmp_path / "b", "b")
    subspace.set_adapter("b")
    subspace(tokens).square().sum().backward()
    with torch.no_grad():
        for parameter in subspace.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    expected = subspace(tokens).detach()
    subspace.set_adapter("default")
    assert not torch.equal(subspace(tokens), expected)
    subspace.set_adapter("b")
    assert torch.equal(subspace(tokens), expected)
    subspace.save_pretrained(tmp_path / "more")  # saves the one at work
    assert torch.equal(SubspaceModel.from_pretrained(Tower(), tmp_path / "more")(tokens), expected)


def test_disable_adapter_is_the_model_that_was_wrapped(trained: Make, tmp_path: Path, tokens: Tensor) -> None:
    subspace = trained("a")
    expected = subspace(tokens).detach()
    inside = []
    with suppress(ZeroDivisionError), subspace.disable_adapter():
        inside.append(subspace(tokens))
        raise ZeroDivisionError
    assert torch.equal(inside[0], Tower()(tokens))
    assert torch.equal(subspace(tokens), expected)


def test_arithmetic_is_exact_in_z_and_in_what_is_trained_beside(trained: Make, tmp_path: Path, tokens: Tensor) -> None:
    """Against weights written out: theta_0 + sum_i w_i (theta_i - theta_0), in float64 to 1e-12."""
    models = {name: trained(name).merge().state_dict() for name in "ab"}
    start = Tower().state_dict()
    subspace = SubspaceModel.from_pretrained(Tower(), tmp_path / "a")
    subspace.load_adapter(tmp_path / "b", "b")
    for number, weights in enumerate(([0.3, 0.7], [1.0, 1.0], [-1.0, 0.0], [2.0, -0.5])):
        subspace.add_weighted_adapter(["default", "b"], weights, f"sum {number}")
        subspace.set_adapter(f"sum {number}")
        literal = Tower()
        literal.load_state_dict(
            {
                key: value + weights[0] * (models["a"][key] - value) + weights[1] * (models["b"][key] - value)
                for key, value in start.items()
            }
        )
        torch.testing.assert_close(subspace(tokens), literal(tokens), rtol=1e-12, atol=1e-12)
        subspace.set_adapter("default")
    subspace.add_weighted_adapter(["sum 2"], [-1.0], "back")
    subspace.set_adapter("back")
    torch.testing.assert_close(subspace(tokens), SubspaceModel.from_pretrained(Tower(), tmp_path / "a")(tokens))


def test_scales_are_swapped_with_their_adapters(basis: Basis, tmp_path: Path, tokens: Tensor) -> None:
    subspace = SubspaceModel(Tower(), basis, init_std=0.3, layer_scales=by_layer(Tower()))
    z = {block.name: own.detach().clone() for block, own in zip(subspace.blocks, subspace.z, strict=True)}
    subspace.set_state(z, scales=torch.tensor([0.7, -1.6]))
    expected = {"a": subspace(tokens).detach()}
    subspace.save_pretrained(tmp_path / "a")
    subspace.set_state(z, scales=torch.tensor([2.0, 3.0]))
    expected["default"] = subspace(tokens).detach()
    subspace.load_adapter(tmp_path / "a", "a")
    for name in ("a", "default"):
        subspace.set_adapter(name)
        with subspace.disable_adapter():
            assert torch.equal(subspace(tokens), Tower()(tokens))
        assert torch.equal(subspace(tokens), expected[name])
    assert torch.equal(subspace.base_state().scales, torch.ones(2, dtype=torch.float64))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="have no weighted sum"):
        subspace.add_weighted_adapter(["default", "a"], [0.5, 0.5], "c")


def test_buffers_of_a_combination_are_those_of_the_first_adapter() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    subspace = SubspaceModel(model, random_basis(by_pattern(model, {"all": "0.*"}), 2))
    state = subspace.get_state().clone()
    for name, mean in (("a", 2.0), ("b", 6.0)):
        buffers = {**state.directly_trained, "1.running_mean": torch.full((4,), mean)}
        subspace.bank.add(name, state._replace(directly_trained=buffers), None)
    subspace.add_weighted_adapter(["b", "a"], [0.5, 0.5], "c")
    subspace.set_adapter("c")
    assert torch.equal(model[1].running_mean, torch.full((4,), 6.0))


def test_buffers_of_a_combination_are_not_those_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    subspace = SubspaceModel(model, random_basis(by_pattern(model, {"all": "0.*"}), 2))
    subspace.bank.add("b", subspace.get_state().clone(), None)
    subspace.add_weighted_adapter(["default", "b"], [0.5, 0.5], "c")
    with torch.no_grad():
        model[1].running_mean.fill_(6.0)
    subspace.set_adapter("c")
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def test_checkpointed_activations_are_those_of_the_adapter_after_it_was_disabled(basis: Basis, tokens: Tensor) -> None:
    """The order of preference training: the policy's forward pass, that of the reference, the backward pass."""
    model = Checkpointed()
    model.reentrant = False
    subspace = SubspaceModel(model, basis, init_std=1.0)
    subspace(tokens).sum().backward()
    expected = [z.grad.clone() for z in subspace.z]
    subspace.zero_grad()
    loss = subspace(tokens).sum()
    with subspace.disable_adapter(), torch.no_grad():
        subspace(tokens)
    loss.backward()
    for z, gradient in zip(subspace.z, expected, strict=True):
        torch.testing.assert_close(z.grad, gradient)


def test_a_disabled_head_is_used_inside_one_autocast_region(basis: Basis, tokens: Tensor) -> None:
    subspace = SubspaceModel(Tower(), basis, modules_to_save=["head"]).float()  # z is 0: no weight is written
    subspace.model.head.bias.data += 1.0
    subspace.model.head.weight.data += 1.0
    with torch.autocast("cpu", torch.bfloat16):
        trained = subspace(tokens)
        with subspace.disable_adapter():
            disabled = subspace(tokens)
    assert not torch.equal(trained, disabled)
    torch.testing.assert_close(disabled.double(), Tower()(tokens), rtol=0.05, atol=0.05)


def test_no_copy_is_made_of_a_disabled_adapter(trained: Make) -> None:
    subspace = trained("a")
    with subspace.disable_adapter(), pytest.raises(InputError, match="disabled"):
        copy.deepcopy(subspace)
    copy.deepcopy(subspace)


def classifier(*labels: str) -> Tower:
    tower = Tower()
    tower.config = PretrainedConfig(id2label=dict(enumerate(labels)), tie_word_embeddings=False)
    return tower


@pytest.fixture
def labelled(basis: Basis, tmp_path: Path) -> SubspaceModel:
    """Three adapters with trained heads: one has the labels in the other order, one in another spelling."""
    for name, labels in (("turned", ("positive", "negative")), ("spelled", ("NEG", "POS"))):
        SubspaceModel(classifier(*labels), basis, modules_to_save=["head"]).save_pretrained(tmp_path / name)
    subspace = SubspaceModel(classifier("negative", "positive"), basis, modules_to_save=["head"])
    for name in ("turned", "spelled"):
        subspace.load_adapter(tmp_path / name, name)
    return subspace


def test_heads_of_labels_in_another_order_are_not_combined(labelled: SubspaceModel) -> None:
    labelled.add_weighted_adapter(["default", "spelled"], [0.5, 0.5], "alike")
    for active in ("default", "turned"):
        labelled.set_adapter(active)
        with pytest.raises(InputError, match=r"has the outputs negative, positive, .*'turned' has positive, negative:"):
            labelled.add_weighted_adapter(["default", "turned"], [0.5, 0.5], "c")
    assert labelled.adapters == ["default", "turned", "spelled", "alike"]
    labelled.set_adapter("alike")
    assert label_names(labelled.model) == ("negative", "positive")


def test_adapters_of_other_labels_without_heads_are_combined(basis: Basis, tmp_path: Path) -> None:
    SubspaceModel(classifier("ham", "spam"), basis).save_pretrained(tmp_path / "a")
    subspace = SubspaceModel(classifier("negative", "positive"), basis)
    subspace.load_adapter(tmp_path / "a", "a")
    subspace.add_weighted_adapter(["default", "a"], [0.5, 0.5], "c")
    assert "c" in subspace.adapters


def test_labels_of_another_number_name_no_outputs(basis: Basis, tmp_path: Path) -> None:
    SubspaceModel(classifier("a", "b", "c"), basis).save_pretrained(tmp_path / "a")
    subspace = SubspaceModel(classifier("negative", "positive"), basis)
    subspace.load_adapter(tmp_path / "a", "a")
    subspace.set_adapter("a")
    assert subspace.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


@pytest.mark.parametrize("own", [("negative", "positive"), ("LABEL_0", "LABEL_1")])
def test_a_disabled_adapter_takes_its_labels_along(
    labelled: SubspaceModel, tmp_path: Path, own: tuple[str, ...]
) -> None:
    subspace = SubspaceModel.from_pretrained(classifier(*own), tmp_path / "turned")
    subspace.load_adapter(tmp_path / "spelled", "spelled")
    for name, expected in (("default", ("positive", "negative")), ("spelled", ("NEG", "POS"))):
        subspace.set_adapter(name)
        with suppress(ZeroDivisionError), subspace.disable_adapter():
            assert subspace.config.id2label == dict(enumerate(own))
            assert subspace.config.label2id == {label: index for index, label in enumerate(own)}
            raise ZeroDivisionError
        assert subspace.config.id2label == dict(enumerate(expected))


def test_an_ensemble_of_another_size_counts_as_its_mean(trained: Make, tmp_path: Path, tokens: Tensor) -> None:
    trained("a")
    expected = trained("b", ensemble=4)(tokens)
    subspace = SubspaceModel.from_pretrained(Tower(), tmp_path / "a")
    subspace.load_adapter(tmp_path / "b", "b")
    subspace.set_adapter("b")
    torch.testing.assert_close(subspace(tokens), expected, rtol=1e-12, atol=1e-12)
    subspace.add_weighted_adapter(["b", "default"], [1.0, 0.0], "same")
    subspace.set_adapter("same")
    torch.testing.assert_close(subspace(tokens), expected, rtol=1e-12, atol=1e-12)


def test_an_ensemble_of_the_same_size_keeps_its_members(trained: Make, tmp_path: Path) -> None:
    expected = trained("a", ensemble=2)
    subspace = trained("b", ensemble=2)
    subspace.load_adapter(tmp_path / "a", "a")
    subspace.set_adapter("a")
    for z, own in zip(subspace.z, expected.z, strict=True):
        assert torch.equal(z, own)


def test_the_order_of_the_trained_modules_does_not_matter(basis: Basis, tmp_path: Path) -> None:
    for name, modules in (("a", ["head", "embedding"]), ("b", ["embedding", "head"])):
        SubspaceModel(Tower(), basis, modules_to_save=modules).save_pretrained(tmp_path / name)
    for name, other in (("a", "b"), ("b", "a")):
        subspace = SubspaceModel.from_pretrained(Tower(), tmp_path / name)
        subspace.load_adapter(tmp_path / other, other)
        assert subspace.adapters == ["default", other]


def test_a_thousand_adapters_cost_their_z_and_heads_alone(trained: Make, tmp_path: Path, tokens: Tensor) -> None:
    expected = trained("a")(tokens)
    subspace = SubspaceModel(Tower(), random_basis(by_layer(Tower()), 3, dtype=torch.float64), modules_to_save=["head"])
    for number in range(1000):
        subspace.load_adapter(tmp_path / "a", f"task {number}")
    states = [subspace.bank.state_of(name) for name in subspace.adapters if name != subspace.active_adapter]
    numbers = sum(value.numel() for one in states for part in (one.z, one.directly_trained) for value in part.values())
    assert numbers == 1000 * (2 * 3 + 4 * 2 + 2)
    subspace.set_adapter("task 999")
    assert torch.equal(subspace(tokens), expected)
    subspace.delete_adapter("task 3")
    assert "task 3" not in subspace.adapters


def test_states_are_read_and_put_back(trained: Make, tokens: Tensor) -> None:
    subspace = trained("a", ensemble=2)
    expected, state = subspace(tokens).detach(), subspace.get_state().clone()
    assert state.directly_trained.keys() == {"head.weight", "head.bias"} == subspace.directly_trained().keys()
    subspace.set_state(*subspace.base_state())
    with torch.no_grad():
        torch.testing.assert_close(subspace(tokens), Tower()(tokens), rtol=0, atol=0)
    subspace.set_state(*state)
    torch.testing.assert_close(subspace(tokens), expected, rtol=0, atol=0)
    assert subspace.bank.state_of("default").z["layers.0"] is subspace.z[0]


def test_a_model_tells_whether_it_follows_a_subspace(trained: Make) -> None:
    subspace = trained("a")
    assert follows_subspace(subspace.model)
    merged = subspace.merge()
    assert not follows_subspace(merged)
    subspace.unmerge()
    assert follows_subspace(merged)
    del subspace
    assert not follows_subspace(merged)


def test_an_opened_adapter_refuses_a_model_whose_weights_were_written(trained: Make, tmp_path: Path) -> None:
    """Through `.data`, where no version counter counts."""
    trained("a")
    adapter, model = OpenedAdapter(tmp_path / "a"), Tower()
    assert adapter.bind(model) == adapter.bind(model)
    model.layers[1].inner.weight.data[0, 0] += 1
    for _ in range(2):  # what was refused is refused again
        with pytest.raises(MismatchError, match=r"another theta_0: the model differs in block 'layers\.1'"):
            adapter.bind(model)
    with pytest.raises(MismatchError, match=r"another theta_0"):
        wrap_with_adapter(SubspaceModel, model, adapter)


def test_the_fingerprint_of_a_model_that_was_wrapped_is_not_remembered(trained: Make, tmp_path: Path) -> None:
    trained("a")
    model = Tower()
    SubspaceModel.from_pretrained(model, tmp_path / "a").merge()
    with pytest.raises(MismatchError, match="another theta_0"):
        SubspaceModel.from_pretrained(model, tmp_path / "a")


def test_a_block_that_one_of_two_models_lacks_is_a_difference() -> None:
    one, two = {"a": "1"}, {"a": "1", "frozen parameters": "2"}
    for expected, actual in ((one, two), (two, one)):
        with pytest.raises(MismatchError, match="in block 'frozen parameters'"):
            require_same(expected, actual, "the adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("ordinary/head.bias"), "it lacks head.bias"),
        (lambda tensors: tensors.update(scales=torch.ones(2)), "it lacks the scales"),
        (lambda tensors: tensors["z/layers.1"].fill_(torch.nan), "z/layers.1 holds NaN"),
    ],
)
def test_a_file_that_is_refused_at_the_end_leaves_the_model_as_it_came(
    trained: Make, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    subspace = trained("a")
    tensors = adapter_tensors(subspace.get_state().clone())
    change(tensors)
    write_adapter(
        tmp_path / "a", tensors, subspace.basis, carried=False, fingerprint=subspace.fingerprint,
        construction={"modules_to_save": ["head"], "ensemble": 1}, model=None, labels=None, overwrite=True,
    )  # fmt: skip
    model = Tower()
    with pytest.raises(StorageError, match=message):
        SubspaceModel.from_pretrained(model, tmp_path / "a")
    assert not follows_subspace(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_misuse_changes_nothing(trained: Make, basis: Basis, tmp_path: Path, tokens: Tensor) -> None:
    subspace = trained("a")
    expected = subspace(tokens).detach()
    trained("b")
    subspace.load_adapter(tmp_path / "b", "b")
    with pytest.raises(InputError, match="choose another name"):
        subspace.load_adapter(tmp_path / "b", "b")
    with pytest.raises(InputError, match="no revision"):
        subspace.load_adapter(tmp_path / "b", "c", revision="main")
    with pytest.raises(InputError, match="choose another name"):
        subspace.add_weighted_adapter(["b"], [1.0], "default")
    for call in (subspace.set_adapter, subspace.delete_adapter):
        with pytest.raises(InputError, match="only \\['default', 'b'\\]"):
            call("c")
    with pytest.raises(InputError, match="is active"):
        subspace.delete_adapter("default")
    for names, weights in ((["b"], []), ([], []), (["b"], [float("nan")])):
        with pytest.raises(InputError, match="one finite weight"):
            subspace.add_weighted_adapter(names, weights, "c")
    other = SubspaceModel(Tower(), random_basis(by_layer(Tower()), 3, seed=1, dtype=torch.float64))
    other.save_pretrained(tmp_path / "other basis")
    with pytest.raises(MismatchError, match="was trained in the basis"):
        subspace.load_adapter(tmp_path / "other basis", "c")
    SubspaceModel(Tower(), basis, modules_to_save=["embedding"]).save_pretrained(tmp_path / "other modules")
    with pytest.raises(MismatchError, match="modules_to_save"):
        subspace.load_adapter(tmp_path / "other modules", "c")
    SubspaceModel(Tower(seed=1), basis, modules_to_save=["head"]).save_pretrained(tmp_path / "other model")
    with pytest.raises(MismatchError, match=r"block 'layers.0'"):
        subspace.load_adapter(tmp_path / "other model", "c")
    damaged = tmp_path / "b/adapter.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    with pytest.raises(StorageError, match="adapter"):
        subspace.load_adapter(tmp_path / "b", "c")
    assert subspace.adapters == ["default", "b"]
    assert torch.equal(subspace(tokens), expected)
    subspace.merge()
    with pytest.raises(InputError, match="merged"):
        subspace.set_adapter("b")
    with pytest.raises(InputError, match="merged"), subspace.disable_adapter():
        pass
    assert subspace.active_adapter == "default"


def test_nothing_changes_adapters_while_they_are_disabled(trained: Make, tmp_path: Path, tokens: Tensor) -> None:
    trained("b")
    subspace = trained("a")
    expected = subspace(tokens).detach()
    subspace.load_adapter(tmp_path / "b", "b")
    with subspace.disable_adapter():
        for call in (
            lambda: subspace.set_adapter("b"),
            lambda: subspace.add_weighted_adapter(["b"], [1.0], "c"),
            lambda: subspace.save_pretrained(tmp_path / "zeros"),
            lambda: subspace.set_state(subspace.base_state().z),
            lambda: subspace.load_state_dict(subspace.base_state().directly_trained, strict=False),
            lambda: export_delta(subspace, tmp_path / "zeros"),
            lambda: export_lora(subspace, tmp_path / "zeros"),
            subspace.state_dict,
            subspace.merge,
            subspace.disable_adapter().__enter__,
        ):
            with pytest.raises(InputError, match="leave the block first"):
                call()
    assert torch.equal(subspace(tokens), expected)
    assert not (tmp_path / "zeros").exists()


def test_gradients_of_one_adapter_do_not_move_another(trained: Make, tmp_path: Path, tokens: Tensor) -> None:
    trained("b")
    subspace = trained("a")
    subspace.load_adapter(tmp_path / "b", "b")
    subspace(tokens).square().sum().backward()
    subspace.set_adapter("b")
    assert all(parameter.grad is None for parameter in subspace.parameters())


def test_scales_of_other_layers_are_refused(tmp_path: Path, tokens: Tensor) -> None:
    tower = Tower()
    basis = random_basis(by_layer(tower), 3, dtype=torch.float64)
    swapped = Partition(tuple(reversed(by_layer(tower).blocks)))
    SubspaceModel(Tower(), basis, layer_scales=swapped).save_pretrained(tmp_path / "a")
    subspace = SubspaceModel(tower, basis, layer_scales=by_layer(tower))
    with pytest.raises(MismatchError, match="scales of the same layers"):
        subspace.load_adapter(tmp_path / "a", "a")


def test_an_adapter_whose_basis_is_not_saved_warns(
    basis: Basis, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    tower = Tower()
    given = Basis.from_directions(
        by_layer(tower),
        {block.name: torch.eye(2, block.numel, dtype=torch.float64) for block in by_layer(tower)},
    )
    subspace = SubspaceModel(tower, given)
    with pytest.warns(
        UserWarning, match=r"a is not saved in a folder.*basis\.save_pretrained\(\).*self_contained=True"
    ):
        subspace.save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match="was never saved to a folder"):
        SubspaceModel.from_pretrained(Tower(), tmp_path / "a")
    SubspaceModel.from_pretrained(Tower(), tmp_path / "a", given)
    subspace.save_pretrained(tmp_path / "b", self_contained=True)
    given.save_pretrained(tmp_path / "basis")
    subspace.save_pretrained(tmp_path / "c")
    SubspaceModel(Tower(), basis).save_pretrained(tmp_path / "drawn from a seed")
    assert not recwarn.list
    SubspaceModel.from_pretrained(Tower(), tmp_path / "b")
    SubspaceModel.from_pretrained(Tower(), tmp_path / "c")
