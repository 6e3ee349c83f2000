"""Residual blocks of real and exported networks: all are found, and the rest runs without them."""

import graphs
import numpy as np
import onnx
import pytest
import residual_graphs
import twin_models
from fixtures.locate import FixtureMissing
from torch import nn

from edgec.passes import PruneBlocks
from edgec.passes.execution import graph_bytes, open_session, run_feeds
from edgec.passes.residual_blocks import find_blocks, remove_blocks

# blocks that can go, and residual branches that cannot
MODELS = {
    "small-cnn": (1, 0),  # its other two shortcuts are convolutions
    "resnet": (3, 0),
    "efficientnet-lite0": (9, 0),
    "minilm eager": (12, 0),
    "minilm sdpa": (12, 0),
    "ocr recogniser": (4, 0),
    "ocr detector": (8, 0),  # x + squeeze-and-excitation of x
    "ocr classifier": (7, 0),
    "silero sequence": (0, 0),
    "magika": (0, 0),
    "lstm": (0, 0),
    "gpt2": (2, 2),  # keys and values of attention are outputs of a decoder
    "llama": (2, 2),
    "t5 encoder": (3, 1),  # the first attention makes the positions for all others
    "t5 decoder": (2, 4),
    "t5 decoder with past": (3, 3),
    "whisper encoder": (4, 0),
    "whisper decoder": (2, 4),
    "whisper decoder with past": (4, 2),  # cross-attention reads a cache that is an input
}


class Bottleneck(nn.Module):
    """As ResNet-50 has it, with a shortcut that is the identity or a convolution."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        same = inputs == 4 * width
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, 4 * width, 1)

    def forward(self, x):
        return nn.functional.relu(self.body(x) + self.shortcut(x))


def raw(name):
    if name == "resnet":
        blocks = [Bottleneck(i, w) for i, w in ((8, 8), (32, 8), (32, 8), (32, 16), (64, 16))]
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
        module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *blocks, *head)
        return twin_models._exported(module, {"image": graphs.feed(1, 3, 16, 16)})
    try:
        return twin_models.MODELS[name]()
    except FixtureMissing as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_blocks_go_and_the_rest_runs(name):
    reference, feeds = raw(name)
    model = twin_models._cleaned(reference.clone())
    blocks = find_blocks(model)
    assert (len(blocks.found), len(blocks.skipped)) == MODELS[name]
    given = graphs.context(reference, calibration=feeds)
    halve = PruneBlocks(ratio=0.5, importance="similarity")  # one run for all blocks
    small = halve.run(model.clone(), given)
    assert small.changed == len(blocks.found) // 2
    onnx.checker.check_model(onnx.load_from_string(graph_bytes(small.model)), full_check=True)
    session, dense = open_session(small.model), open_session(model)
    for sample in feeds:
        for expected, actual in zip(
            run_feeds(dense, sample), run_feeds(session, sample), strict=True
        ):
            assert actual.shape == expected.shape and np.isfinite(actual).all()
    # counted against the graph as it was exported
    assert halve.run(small.model, given).changed == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (found, _) in MODELS.items() if found])
def test_without_a_block_the_model_is_what_it_is_with_a_branch_times_zero(name):
    reference, [sample, *_] = raw(name)
    model = twin_models._cleaned(reference)
    found = find_blocks(model).found
    for block in {found[0], found[len(found) // 2], found[-1]}:
        small = model.clone()
        remove_blocks(small, [block])
        pair = (residual_graphs.silenced(model, block), small)
        expected, actual = (run_feeds(open_session(m, optimized=False), sample) for m in pair)
        for one, other in zip(expected, actual, strict=True):
            np.testing.assert_array_equal(other, one)
