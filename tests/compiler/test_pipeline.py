"""Running the passes of a recipe: what its steps report."""

from __future__ import annotations

import graphs

from edgec.passes.reconstruct import Reconstruct
from edgec.pipeline import run_passes
from edgec.recipe import load_recipe
from edgec.report_format import _told_apart


def test_a_pass_that_was_asked_for_and_did_nothing_says_so():
    model, feeds = graphs.mlp()
    around = graphs.context(model, calibration=[feeds])
    (step,) = run_passes((Reconstruct(),), around, [feeds])  # no integer weights yet
    assert step.result.changed == 0
    (finding,) = step.result.findings
    assert "changed nothing" in finding and "edgec passes reconstruct" in finding


def test_passes_of_every_recipe_may_do_nothing_silently():
    model, feeds = graphs.mlp()
    steps = run_passes(load_recipe("cleanup,fuse,lower"), graphs.context(model), [feeds])
    assert [step.result.findings for step in steps] == [(), (), ()]


def test_recipes_that_were_tried_are_named_by_what_tells_them_apart():
    assert _told_apart(("cleanup", "fuse", "quantize-static", "lower")) == "quantize-static"
    assert _told_apart(("cleanup", "fuse", "lower")) == "float32"
    assert _told_apart(("quantize-static", "recover", "lower")) == "quantize-static, recover"
