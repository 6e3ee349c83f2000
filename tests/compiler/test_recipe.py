"""Recipes: TOML and passes are two forms of one thing, and mistakes are told."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import graphs
import numpy as np
import pytest

from edgec import recipe
from edgec.errors import RecipeError
from edgec.passes import PASSES
from edgec.targets import load_target, target_names


def other_value(name: str, value: Any) -> Any:
    """A value of the same type."""
    if isinstance(value, bool):
        return not value
    if name == "kinds":  # words of a fixed list
        return tuple(reversed(value))
    if isinstance(value, tuple):
        return ('/a "quoted"/MatMul', "back\\slash", "Ünï")
    return value


@pytest.mark.parametrize("cls", PASSES, ids=lambda cls: cls.name)
def test_every_pass_survives_toml(cls: Any, tmp_path: pathlib.Path) -> None:
    default = cls()
    changed = cls(**{k: other_value(k, v) for k, v in dataclasses.asdict(default).items()})
    for pass_ in (default, changed):
        path = tmp_path / "recipe.toml"
        path.write_text(recipe.to_toml([pass_]), encoding="utf-8")
        assert recipe.load_recipe(path) == (pass_,)


@pytest.mark.parametrize("target", target_names())
@pytest.mark.parametrize("calibrated", [True, False])
def test_every_default_recipe_is_in_order(target: str, calibrated: bool) -> None:
    for made in (graphs.cnn, graphs.transformer, graphs.lstm):
        model, _ = made()
        passes, *others = recipe.default_recipes(load_target(target), model, calibrated)
        assert recipe.load_recipe(load_target(target).recipe.lossless) in (passes, *others)
        assert passes[0].name == "cleanup" and passes[-1].name == "lower"
        needs_data = any(p.name == "quantize-static" for p in passes)
        assert calibrated or not needs_data
        assert recipe.from_toml(recipe.to_toml(passes), "text") == passes


@pytest.mark.parametrize("target", target_names())
def test_without_calibration_data_the_recipe_still_makes_convolutions_smaller(target: str) -> None:
    # dynamic int8 leaves Conv alone: the bundle came out larger than the float32 file
    passes, *_ = recipe.default_recipes(load_target(target), graphs.cnn()[0], calibrated=False)
    assert any(p.name in ("quantize-weights", "convert-float16") for p in passes)


def test_what_calibration_data_would_have_changed_is_told() -> None:
    cnn, transformer, lstm = (getattr(graphs, kind)()[0] for kind in ("cnn", "transformer", "lstm"))
    x86 = load_target("x86-64")
    told = recipe.missed_without_data(x86, cnn)
    assert "quantize-weights, lower in place of cleanup, fuse, quantize-static" in told
    assert "smooth-activations" in recipe.missed_without_data(x86, transformer)
    assert recipe.missed_without_data(x86, lstm) == ""  # its recipe needs none


def test_most_weights_decide_the_kind_of_model() -> None:
    kinds = {m: recipe.model_kind(getattr(graphs, m)()[0]) for m in ("cnn", "transformer", "lstm")}
    assert kinds == {"cnn": "convolutional", "transformer": "transformer", "lstm": "recurrent"}


@pytest.mark.parametrize(("hidden", "kind"), [(4, "recurrent"), (2, "convolutional")])
def test_recurrences_decide_from_a_third_of_the_weights(hidden: int, kind: str) -> None:
    text = f"""listens (float[1, 8, 20] x) => (float[18, 1, 1, {hidden}] y) {{
        c = Conv (x, k)
        t = Transpose <perm = [2, 0, 1]> (c)
        y, h, n = LSTM <hidden_size = {hidden}> (t, w, r)
    }}"""  # Conv has 1,536 weights, LSTM 1,088 or 528
    weights = {"k": (64, 8, 3), "w": (1, 4 * hidden, 64), "r": (1, 4 * hidden, hidden)}
    made = {name: graphs.weight(*shape) for name, shape in weights.items()}
    assert recipe.model_kind(graphs.graph(text, made)) == kind


def test_weights_that_the_graph_slices_count_for_the_layer_behind() -> None:
    text = """sliced (float[1, 8, 20] x) => (float[18, 1, 1, 4] y) {
        c = Conv (x, k)
        t = Transpose <perm = [2, 0, 1]> (c)
        s = Slice (w, from, to)
        y, h, n = LSTM <hidden_size = 4> (t, s, r)
    }"""
    weights = {"k": (64, 8, 3), "w": (2, 16, 64), "r": (1, 16, 4)}
    made = {name: graphs.weight(*shape) for name, shape in weights.items()}
    ends = {"from": np.array([0]), "to": np.array([1])}
    assert recipe.model_kind(graphs.graph(text, made | ends)) == "recurrent"


def test_settings_change_one_pass_and_keep_the_rest() -> None:
    passes = recipe.load_recipe("cleanup,quantize-weights")
    changed = recipe.with_settings(passes, ["quantize-weights.bits=4"])
    assert changed[0] == passes[0] and changed[1] != passes[1]
    assert recipe.parameters_of(changed[1])["bits"] == 4
    both = recipe.with_settings(changed, ["quantize-weights.block-size=64"])
    assert recipe.parameters_of(both[1])["bits"] == 4
    assert recipe.parameters_of(both[1])["block_size"] == 64


@pytest.mark.parametrize("order", [1, -1])
def test_settings_of_a_pass_count_together_whichever_is_given_first(order: int) -> None:
    settings = ["recover.bits_from=8", "recover.rate=0.1", "recover.bias_rate=0"][::order]
    recipe.check_settings(settings)
    (made,) = recipe.with_settings(recipe.load_recipe("recover"), settings)
    assert recipe.parameters_of(made)["bits_from"] == 8
    for wrong in ("recover.rat=1", "recover.rate=fast"):
        with pytest.raises(RecipeError, match="--set recover.bias_rate=0 --set recover.rat"):
            recipe.check_settings(["recover.bias_rate=0", wrong])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[pass]]\n", "without a name"),
        ("pass = 3", r"expected \[\[pass\]\] tables"),
        ('[[passes]]\nname = "fuse"', r"expected \[\[pass\]\] tables"),
        ('[[pass]]\nname = "fusse"', "unknown pass 'fusse', did you mean 'fuse'"),
        ('[[pass]]\nname = "prune-magnitude"\nsparsity = "half"', "'half', expected a float"),
        ('[[pass]]\nname = "convert-float16"\nskip = [1]', "an item is 1, expected a str"),
        ('[[pass]]\nname = "lower"\n[[pass]]\nname = "fuse"', r"'fuse' \(clean\) stands after"),
    ],
)
def test_a_wrong_recipe_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe.from_toml(text, "r.toml")


def test_training_may_stand_before_or_after_quantization_and_take_turns_with_pruning() -> None:
    from edgec.passes import Stage

    @dataclasses.dataclass(frozen=True)
    class Train:
        name = "train"
        stage = Stage.TRAIN

    quantize, lower = recipe.load_recipe("quantize-weights"), recipe.load_recipe("lower")
    train: Any = (Train(),)
    prune = recipe.load_recipe("prune-magnitude")
    orders = (train + quantize + lower, quantize + train + lower, train + quantize + train)
    for order in (*orders, prune + train + prune + train + quantize + train):
        assert recipe.check_order(order) == order
    with pytest.raises(RecipeError):
        recipe.check_order(lower + train)
    with pytest.raises(RecipeError):
        recipe.check_order(quantize + train + prune)


def test_a_lock_belongs_to_the_version_of_its_passes(monkeypatch):
    from edgec.passes import Cleanup
    from edgec.recipe import load_recipe, to_toml

    before = to_toml(load_recipe("cleanup"))
    monkeypatch.setattr(Cleanup, "version", Cleanup.version + 1)
    assert to_toml(load_recipe("cleanup")) != before
