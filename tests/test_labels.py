"""Names of labels: which mean the same, and what is saved with an adapter."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tinyspan import SubspaceModel, by_pattern, random_basis
from tinyspan.interop.deltas import apply_delta, export_delta
from tinyspan.labels import canonical, is_generic, label_names, positions, set_label_names


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["entailment", "neutral", "contradiction"], ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], (2, 1, 0)),
        (["entailment", "not_entailment"], ["not entailment", "Entailment"], (1, 0)),
        (["entailment", "not_entailment"], ["non-entailment", "entailment"], (1, 0)),
        (["entailment", "not_entailment"], ["entails", "nonEntailment"], (0, 1)),
        (["not_duplicate", "duplicate"], ["is_duplicate", "no_duplicate"], (1, 0)),
        (["unacceptable", "acceptable"], ["acceptable", "not acceptable"], (1, 0)),
        (["negative", "positive"], ["neg", "pos"], (0, 1)),
        (["negative", "positive"], ["POSITIVE", "NEGATIVE"], (1, 0)),
        (["negative", "positive"], ["LABEL_0", "LABEL_1"], None),
        (["negative", "positive"], ["negative", "neutral", "positive"], None),
        (["not_equivalent", "equivalent"], ["not_duplicate", "duplicate"], None),
        (["a", "b"], ["a", "a"], None),
        (["neg", "negative"], ["negative", "neg"], (1, 0)),  # one canonical form, so compared literally
        (["neg", "negative"], ["Negative", "Neg"], None),
        (["C", "C++", "C#"], ["c#", "c", "c++"], (1, 2, 0)),
        (["<=50K", ">50K"], [">50K", "<=50K"], (1, 0)),
        (["<=50K", "other"], ["other", ">50K"], None),
        (["A", "A-"], ["A-", "A"], (1, 0)),
        (["Straße", "Weg"], ["weg", "STRASSE"], (1, 0)),
        (["0", "1"], ["1", "0"], (1, 0)),
    ],
)
def test_labels_are_matched_by_name(labels: list[str], names: list[str], expected: tuple[int, ...] | None) -> None:
    assert positions(labels, names) == expected
    back = positions(names, labels)
    if expected is None:
        assert back is None
    else:
        assert back is not None
        assert [back[index] for index in expected] == list(range(len(labels)))


def test_names_that_count_the_outputs_say_nothing() -> None:
    for names in (["LABEL_0", "LABEL_1"], ["label 0"], ["0", "1", "2"], ["class-0", "Class_1"], ["score"]):
        assert is_generic(names), names
    for names in (
        ["1", "2"],
        ["LABEL_1", "LABEL_0"],
        ["1 star"],
        ["negative", "LABEL_1"],
        ["toxicity"],
        ["score", "b"],
    ):
        assert not is_generic(names), names
    assert canonical(" Not  Entailment ") == canonical("not_entailment")


def classifier(*names: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, len(names)))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
    config = SimpleNamespace(id2label=dict(enumerate(names)), num_labels=len(names))
    model.config = config  # type: ignore[assignment]
    return model


def subspace_of(model: nn.Module) -> SubspaceModel:
    return SubspaceModel(
        model, random_basis(by_pattern(model, {"all": r"0\..*"}), 1), modules_to_save=["1"], init_std=1
    )


def test_names_of_a_config_come_in_the_order_of_their_numbers() -> None:
    config = SimpleNamespace(id2label={10: "k", 2: "c", **dict.fromkeys((0, 1, *range(3, 10)), "x")})
    assert label_names(config) == ("x", "x", "c", *["x"] * 7, "k")
    assert label_names(SimpleNamespace(id2label={"1": "b", "0": "a"})) == ("a", "b")
    assert label_names(nn.Linear(1, 1)) is None
    assert label_names(classifier("LABEL_0", "LABEL_1")) is None
    model = classifier("a", "b")
    set_label_names(model, ["c"])  # of a head of another size
    assert label_names(model) == ("a", "b")


def test_an_adapter_brings_the_names_of_its_labels(tmp_path: Path) -> None:
    subspace_of(classifier("ham", "spam")).save_pretrained(tmp_path / "mail")
    subspace_of(classifier("LABEL_0", "LABEL_1")).save_pretrained(tmp_path / "unnamed")
    model = classifier("negative", "positive")
    loaded = SubspaceModel.from_pretrained(model, tmp_path / "mail")
    assert loaded.merge().config.id2label == {0: "ham", 1: "spam"}
    assert loaded.merge().config.label2id == {"ham": 0, "spam": 1}
    unnamed = SubspaceModel.from_pretrained(classifier("negative", "positive"), tmp_path / "unnamed")
    assert label_names(unnamed.model) == ("negative", "positive")


def test_names_change_with_the_adapter_at_work(tmp_path: Path) -> None:
    subspace_of(classifier("ham", "spam")).save_pretrained(tmp_path / "mail")
    subspace_of(classifier("LABEL_0", "LABEL_1")).save_pretrained(tmp_path / "unnamed")
    subspace = subspace_of(classifier("negative", "positive"))
    subspace.load_adapter(tmp_path / "mail", "mail")
    subspace.load_adapter(tmp_path / "unnamed", "unnamed")
    assert label_names(subspace.model) == ("negative", "positive")
    subspace.set_adapter("mail")
    assert label_names(subspace.model) == ("ham", "spam")
    subspace.add_weighted_adapter(["mail", "unnamed"], [0.5, 0.5], "sum")
    subspace.set_adapter("unnamed")
    assert label_names(subspace.model) is None
    subspace.set_adapter("default")
    assert label_names(subspace.model) == ("negative", "positive")
    subspace.set_adapter("sum")
    assert label_names(subspace.model) == ("ham", "spam")


def test_a_delta_brings_the_names_of_its_labels(tmp_path: Path) -> None:
    subspace = subspace_of(classifier("ham", "spam"))
    export_delta(subspace, tmp_path / "delta.safetensors")
    model = classifier("negative", "positive")
    apply_delta(model, tmp_path / "delta.safetensors")
    assert label_names(model) == ("ham", "spam")
