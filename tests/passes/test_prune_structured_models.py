"""A quarter of real and exported networks comes off: they run, and are as wide as they say."""

import graphs
import numpy as np
import onnx
import pytest
import small_models
import twin_models
from fixtures.locate import FixtureMissing
from torch import nn

import edgec
from edgec.passes import PruneStructured
from edgec.passes.dimension_groups import coupled_groups
from edgec.passes.execution import graph_bytes, open_session, run_feeds

# the kinds of units that go, and what is left of the weights, at most
MODELS = {
    "small-cnn": ({"channel"}, 0.8),
    "efficientnet-lite0": ({"channel"}, 0.7),
    "resnet": ({"channel"}, 0.65),
    "minilm eager": ({"head", "hidden"}, 0.9),
    "minilm sdpa": ({"head", "hidden"}, 0.9),
    # its 8 heads of 15 make no other multiple of 8
    "ocr recogniser": ({"channel", "hidden"}, 0.7),
    "ocr detector": ({"channel"}, 0.6),
    "ocr classifier": ({"channel"}, 0.7),
    "silero sequence": ({"channel"}, 0.8),
    "magika": ({"hidden"}, 0.8),
    "lstm": ({"hidden"}, 0.7),
    "gru": ({"hidden"}, 0.7),
    "gpt2": ({"hidden"}, 0.95),
    "llama": ({"hidden"}, 0.9),
    "t5 encoder": ({"head", "hidden"}, 0.8),
    "whisper encoder": ({"channel", "head", "hidden"}, 0.9),
}


class Bottleneck(nn.Module):
    """As ResNeXt has it: narrow, grouped, wide, with a shortcut."""

    def __init__(self, inputs: int, width: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 2, 1, groups=groups), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        self.shortcut = nn.Conv2d(inputs, 4 * width, 1, 2)

    def forward(self, x):
        return nn.functional.relu(self.body(x) + self.shortcut(x))


def resnet():
    body = (Bottleneck(32, 32, 1), Bottleneck(128, 64, 16))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
    module = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), *body, *head)
    return twin_models._exported(module, {"image": graphs.feed(1, 3, 16, 16)})


def made(name):
    if name == "resnet":
        model, feeds = resnet()
        return twin_models._cleaned(model), feeds
    try:
        return twin_models.make(name)
    except FixtureMissing as missing:
        pytest.skip(str(missing))


def weights(model):
    return sum(v.const_value.size for v in model.graph.initializers.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_quarter_comes_off_and_the_rest_runs(name):
    model, feeds = made(name)
    kinds, left = MODELS[name]
    result = PruneStructured(ratio=0.25, round_to=8).run(model.clone(), graphs.context(model))
    assert {entry["kind"] for entry in result.decisions["groups"]} == kinds
    assert weights(result.model) < left * weights(model)
    onnx.checker.check_model(onnx.load_from_string(graph_bytes(result.model)), full_check=True)
    session, dense = open_session(result.model), open_session(model)
    for sample in feeds:
        for expected, actual in zip(
            run_feeds(dense, sample), run_feeds(session, sample), strict=True
        ):
            assert actual.shape == expected.shape and np.isfinite(actual).all()
    groups = {group.name: group for group in coupled_groups(model).found}
    for entry in result.decisions["groups"]:
        for part in groups[entry["name"]].slices:
            positions = part.indices.shape[1]
            # T5 adds one number a head to the scores: that is no width of a layer
            if part.role == "produces" and (entry["kind"] != "head" or positions > 1):
                width = len(entry["kept"]) * positions
                assert width % 8 == 0, (entry["name"], entry["kind"], part.name, width)


@pytest.mark.slow
def test_pruned_recovered_and_quantized_in_one_recipe_and_again_from_its_lock(tmp_path):
    """The bundle is smaller than the dense one's, and the lock repeats it without training."""
    images = small_models.images(16)
    common = {
        "target": "x86-64",
        "calibration": lambda: [{"image": image} for image in images],
        "evaluation": lambda: [{"image": image} for image in small_models.images(4, seed=5)],
        "verify": False,
    }
    source = edgec.Source(
        small_models.cnn(), (small_models.image(),), input_names=("image",), name="cnn"
    )
    recipe = ("cleanup", "fuse", "prune-structured", "recover", "quantize-static", "lower")
    settings = (
        "prune-structured.ratio=0.5",
        "prune-structured.round_to=8",
        "recover.rate=0.5",
        "recover.steps=10",
    )
    paths = [tmp_path / name / "cnn.edgec" for name in ("dense", "pruned", "again")]
    dense = tuple(name for name in recipe if name not in ("prune-structured", "recover"))
    edgec.build(source, output=paths[0], recipe=dense, **common)
    report = edgec.build(source, output=paths[1], recipe=recipe, settings=settings, **common)
    [lock] = paths[1].parent.glob("*.lock.json")
    edgec.build(source, output=paths[2], lock=lock, **common)
    assert [step.changed > 0 for step in report.steps if step.name == "prune-structured"] == [True]
    assert "units in 2 groups are cut" in str(report.to_json())
    assert paths[1].stat().st_size < paths[0].stat().st_size
    assert paths[2].read_bytes() == paths[1].read_bytes()


@pytest.mark.slow
def test_a_build_by_latency_keeps_its_table_and_tells_how_good_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEC_CACHE", str(tmp_path / "cache"))
    report = edgec.build(
        edgec.Source(small_models.cnn(), (small_models.image(),), input_names=("image",)),
        target="x86-64",
        calibration=lambda: [{"image": image} for image in small_models.images(8)],
        output=tmp_path / "cnn.edgec",
        recipe=("cleanup", "fuse", "prune-structured", "quantize-static", "lower"),
        settings=(
            "prune-structured.ranking=latency",
            "prune-structured.ratio=0.2",
            "prune-structured.round_to=8",
        ),
        verify=False,
    )
    [table] = (tmp_path / "cache" / "latencies").iterdir()
    assert "Conv" in table.read_text()
    assert "latency in int8 predicted" in str(report.to_json())
