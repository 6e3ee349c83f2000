"""The contract that every pass keeps, over small graphs of each kind of network."""

import dataclasses
import json
import os
import subprocess
import sys

import graphs
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgec.passes import PASSES, Pass, Stage
from edgec.passes.execution import graph_bytes

GRAPHS = {
    "cnn": graphs.cnn,
    "lstm": graphs.lstm,
    "mlp": graphs.mlp,
    "transformer": graphs.transformer,
}


class Calibration:
    """Four feeds of the graph's inputs: the given one, scaled where it is a float."""

    def __init__(self, feeds):
        self.feeds = feeds

    def __iter__(self):
        for scale in (1.0, 0.5, 1.5, 0.8):
            yield {
                name: array * np.float32(scale) if array.dtype == np.float32 else array
                for name, array in self.feeds.items()
            }

    def __len__(self):
        return 4


def make(cls):
    """The pass at its defaults, but with the small graphs' weights large enough for it.

    Without promises of a build, a share of the units has to be given.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    given = {"min_weights": 100, "ratio": 0.25}
    return cls(**{name: value for name, value in given.items() if name in known})


def run(cls, name, model=None, lock=None):
    made, feeds = GRAPHS[name]()
    context = graphs.context(made, calibration=Calibration(feeds))
    context = dataclasses.replace(context, lock=lock or {})
    return make(cls).run(made if model is None else model, context)


def signature(model):
    values = [*model.graph.inputs, *model.graph.outputs]
    return [(v.name, v.dtype, str(v.shape)) for v in values]


every_pass = pytest.mark.parametrize("cls", PASSES, ids=lambda cls: cls.name)
every_graph = pytest.mark.parametrize("name", GRAPHS)


def test_passes_are_listed_in_the_order_of_their_stages():
    stages = [cls.stage for cls in PASSES]
    assert stages == sorted(stages)
    assert len({cls.name for cls in PASSES}) == len(PASSES)


@every_pass
def test_pass_is_a_frozen_dataclass_with_name_stage_and_version(cls):
    chosen = cls()
    assert isinstance(chosen, Pass) and isinstance(cls.stage, Stage)
    assert cls.version >= 1 and isinstance(cls.lossless, bool)
    assert cls.name == cls.name.lower() and "_" not in cls.name
    assert cls.__doc__
    for field in dataclasses.fields(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(chosen, field.name, None)


@every_pass
def test_parameters_are_plain_data_and_rebuild_the_pass(cls):
    parameters = dataclasses.asdict(cls())
    again = json.loads(json.dumps(parameters))
    restored = {k: tuple(v) if isinstance(v, list) else v for k, v in again.items()}
    assert repr(cls(**restored)) == repr(cls())


@every_pass
@every_graph
def test_result_is_valid_and_keeps_the_signature(cls, name):
    model, feeds = GRAPHS[name]()
    before = signature(model)
    result = run(cls, name)
    assert signature(result.model) == before
    onnx.checker.check_model(onnx.load_from_string(graph_bytes(result.model)))
    for reference, actual in zip(
        graphs.run(model, **feeds), graphs.run(result.model, **feeds), strict=True
    ):
        assert actual.shape == reference.shape and np.isfinite(actual).all()
    values = {v.name for n in result.model.graph.all_nodes() for v in n.outputs}
    assert set(result.touched) <= values
    json.dumps(dict(result.decisions))


@every_pass
@every_graph
def test_every_refusal_has_a_node_and_a_reason(cls, name):
    for skip in run(cls, name).skipped:
        assert skip.node and skip.reason


@every_pass
@every_graph
def test_no_change_means_equal_bytes(cls, name):
    model, _ = GRAPHS[name]()
    before = graph_bytes(model)
    result = run(cls, name)
    assert (graph_bytes(result.model) == before) == (result.changed == 0)


@every_pass
@every_graph
def test_second_run_changes_nothing(cls, name):
    once = run(cls, name)
    before = graph_bytes(once.model)
    again = run(cls, name, once.model)
    assert again.changed == 0
    assert graph_bytes(again.model) == before


@every_pass
@every_graph
def test_clone_of_the_input_keeps_its_weights(cls, name):
    model, _ = GRAPHS[name]()
    clone = model.clone()
    before = graph_bytes(clone)
    run(cls, name, model)
    assert graph_bytes(clone) == before


@pytest.mark.parametrize("cls", [c for c in PASSES if c.lossless], ids=lambda cls: cls.name)
@every_graph
def test_lossless_means_equal_outputs(cls, name):
    model, feeds = GRAPHS[name]()
    for reference, actual in zip(
        graphs.run(model, **feeds), graphs.run(run(cls, name).model, **feeds), strict=True
    ):
        # float32 summation in another order
        np.testing.assert_allclose(actual, reference, rtol=1e-4, atol=1e-4)


@every_pass
@every_graph
def test_decisions_replay_to_the_same_bytes(cls, name):
    first = run(cls, name)
    replayed = run(cls, name, lock=json.loads(json.dumps(dict(first.decisions))))
    assert graph_bytes(replayed.model) == graph_bytes(first.model)


def test_recipe_of_every_pass_survives_toml(tmp_path):
    from edgec.recipe import load_recipe, to_toml

    for cls in PASSES:
        path = tmp_path / f"{cls.name}.toml"
        path.write_text(to_toml((cls(),)))
        assert load_recipe(path) == (cls(),)


_DIGESTS = """
import hashlib
import test_every_pass as t
for cls in t.PASSES:
    for name in t.GRAPHS:
        digest = hashlib.sha256(t.graph_bytes(t.run(cls, name).model)).hexdigest()
        print(cls.name, name, digest)
"""


@pytest.mark.slow
def test_same_input_gives_the_same_bytes_in_another_process_and_hash_seed():
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here)])
    outputs = [
        subprocess.run(
            [sys.executable, "-c", _DIGESTS],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0].splitlines()) == len(PASSES) * len(GRAPHS)


def test_quantized_models_survive_a_save_and_a_load(tmp_path):
    for cls in PASSES:
        model = run(cls, "transformer").model
        ir.save(model, tmp_path / "model.onnx")
        assert graph_bytes(ir.load(tmp_path / "model.onnx")) == graph_bytes(model)
