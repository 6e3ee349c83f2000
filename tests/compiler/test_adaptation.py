"""``edgec adapt``: a model or an adapter from labels, judged on what is new and what is old."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from adaptation_samples import fill, save, teach
from click.testing import CliRunner
from labelled_samples import separable

import edgec
import edgec_runtime
from edgec import targets
from edgec.adaptation import adapt
from edgec.cli import main
from edgec.cli_adapt import adapt as command
from edgec.errors import (
    DataError,
    OutputError,
    PassError,
    RecipeError,
    SourceError,
    TargetError,
)
from edgec.passes.adapt import Adapt


@pytest.fixture(scope="module")
def work(tmp_path_factory: Any) -> pathlib.Path:
    return fill(tmp_path_factory.mktemp("adapt"))


def data(work: pathlib.Path) -> dict[str, pathlib.Path]:
    return {"data": work / "data.npz", "evaluation": work / "test.npz"}


def test_a_source_becomes_an_onnx_file_that_a_build_takes(work, tmp_path):
    made = teach(work, "cnn.onnx", tmp_path / "new.onnx", classes=4, remember=3)
    assert made.new.before < 0.6 and made.new.after > 0.95 and made.new.samples == 40
    assert made.written == tmp_path / "new.onnx" and made.memory == tmp_path / "new.memory.npz"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.memory.npz", "new.onnx"]
    with np.load(made.memory) as memory:
        assert sorted(memory["label"].reshape(-1)) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
        assert memory["held_out"].tolist() == [False] * 8 + [True] * 4
    report = edgec.build(
        made.written,
        target="x86-64",
        output=tmp_path / "out",
        evaluation=work / "test.npz",
        metric="top1",
        recipe=["cleanup", "fuse", "lower"],
        verify=False,
    )
    assert report.metric is not None and report.metric.bundle == made.new.after


def test_a_second_round_is_judged_on_the_memory_or_on_old_data(work, tmp_path):
    teach(work, "cnn.onnx", tmp_path / "one.onnx", remember=4)
    one = {"memory": str(tmp_path / "one.memory.npz"), "steps": 3}
    made = adapt(tmp_path / "one.onnx", work / "data.npz", tmp_path / "two.onnx", **one)
    assert made.old.on == "held-out samples of the memory" and made.old.samples == 4
    # of the 64 samples, the 16 in the memory are left out, and a quarter is held out
    assert made.new.on == "held-out samples" and made.new.samples == 12
    made = teach(work, "cnn.onnx", tmp_path / "x.onnx", old_evaluation=work / "test.npz", steps=2,
                 evaluation=None)  # fmt: skip
    assert made.old.on == "old evaluation" and made.old.samples == 40


def test_a_memory_without_held_out_samples_says_what_it_is_judged_on(work, tmp_path):
    teach(work, "cnn.onnx", tmp_path / "one.onnx", remember=1)
    made = teach(
        work, "cnn.onnx", tmp_path / "two.onnx", steps=1, memory=tmp_path / "one.memory.npz"
    )
    assert made.old.on == "the memory, which was learned from: it has no held-out samples"
    assert made.old.samples == 4


def test_refuses_data_that_the_memory_holds_already(work, tmp_path):
    save(tmp_path / "few.npz", 8, 3)
    few = {"data": tmp_path / "few.npz", "steps": 1, "evaluation": None}
    teach(work, "cnn.onnx", tmp_path / "one.onnx", remember=8, **few)
    again = few | {"data": tmp_path / "one.memory.npz", "memory": tmp_path / "one.memory.npz"}
    with pytest.raises(DataError, match="evaluation or memory hold the same samples"):
        teach(work, "cnn.onnx", tmp_path / "two.onnx", **again)


def test_refuses_to_write_over_a_file_that_it_reads(work, tmp_path):
    shutil.copy(work / "cnn.onnx", tmp_path / "base.onnx")
    for name in ("a.memory.npz", "data.npz", "test.npz"):
        save(tmp_path / name, 16, len(name))
    (tmp_path / "link.onnx").symlink_to(tmp_path / "base.onnx")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    data, memory = tmp_path / "data.npz", tmp_path / "a.memory.npz"
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("base.onnx", "base", {}),
        ("link.onnx", "base", {}),
        ("a.onnx", "memory", {"memory": str(memory), "remember": 2}),
        ("a.onnx", "data", {"data": memory, "remember": 2}),
        ("a.onnx", "evaluation", {"evaluation": memory, "remember": 2}),
        ("a.onnx", "old evaluation", {"old_evaluation": memory, "remember": 2}),
    ]
    for output, what, settings in cases:
        given = {"data": data, "steps": 1} | settings
        with pytest.raises(OutputError, match=f"this file is the {what} that is read.*another -o"):
            adapt(tmp_path / "base.onnx", given.pop("data"), tmp_path / output, **given)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(OutputError, match="this file is the data that is read"):
        adapt(work / "slots.edgec", memory, tmp_path / "a.onnx_adapter", remember=2)
    # without remember nothing is written there
    adapt(tmp_path / "base.onnx", memory, tmp_path / "a.onnx", steps=1)


def test_a_head_that_is_a_convolution_is_judged_along_its_channels(work, tmp_path):
    text = """g (float[n, 4, 12, 12] x) => (float[n, 4, 1, 1] y) {
        p = GlobalAveragePool (x)
        [head] y = Conv (p, w)
    }"""
    ir.save(graphs.graph(text, {"w": graphs.weight(4, 4, 1, 1)}), tmp_path / "conv.onnx")
    made = teach(tmp_path, "conv.onnx", tmp_path / "a.onnx", steps=60, rate=0.1, **data(work))
    assert made.new.after > 0.95 > made.new.before


def test_an_adapter_is_trained_for_a_bundle_and_judged_in_it(work, tmp_path):
    made = teach(work, "slots.edgec", tmp_path / "a.onnx_adapter", steps=120)
    assert made.new.after > 0.9 > made.new.before
    model = edgec_runtime.load(work / "slots.edgec")
    feeds, labels = separable(40, 4, 1)

    def accuracy() -> float:
        found = [model(**f)["y"].argmax() for f in feeds]
        return float(np.mean([a == b["label"][0] for a, b in zip(found, labels, strict=True)]))

    assert accuracy() == made.new.before
    model.use_adapter(made.written)
    assert accuracy() == made.new.after
    assert model.self_test().passed
    again = teach(work, "slots.edgec", tmp_path / "b.onnx_adapter", steps=120)
    assert again.written.read_bytes() == made.written.read_bytes()


def test_a_bundle_of_a_target_of_ones_own_takes_its_file(work, tmp_path):
    shipped = pathlib.Path(targets.__file__).with_name("x86-64.toml").read_text()
    own = tmp_path / "own.toml"
    own.write_text(shipped.replace('name = "x86-64"', 'name = "own"'))
    bundle = tmp_path / "own.edgec"
    recipe = ["cleanup", "fuse", "lower", "adapter-slots"]
    edgec.build(work / "cnn.onnx", target=own, output=bundle, recipe=recipe, verify=False)
    rest = {"steps": 1, "data": work / "data.npz", "evaluation": None}
    with pytest.raises(TargetError, match="unknown target 'own'.*or a path to a .toml file"):
        teach(tmp_path, "own.edgec", tmp_path / "a.onnx_adapter", **rest)
    made = teach(tmp_path, "own.edgec", tmp_path / "a.onnx_adapter", target=own, **rest)
    assert made.written.is_file()


def test_the_bundle_with_slots_agrees_with_its_reference(work):
    report = json.loads((work / "slots.report.json").read_text())
    assert "adapter-slots" in json.dumps(report)
    model = edgec_runtime.load(work / "slots.edgec")
    assert len(model.slots) == 4 and [v.name for v in model.inputs] == ["x"]


def test_the_command_prints_json_and_says_what_it_cannot_do(work, tmp_path):
    arguments = ["adapt", str(work / "cnn.onnx"), "--data", str(work / "data.npz"), "--json"]
    done = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "n.onnx"), "--steps", "3"])
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["method"] == "full" and set(facts["accuracy_new"]) == {
        "judged_on", "samples", "before", "after"
    }  # fmt: skip
    given = [
        "--rank",
        "4",
        "--patience",
        "2",
        "--precision",
        "bf16",
        "-o",
        str(tmp_path / "n.onnx"),
    ]
    unused = CliRunner().invoke(main, [*arguments, *given])
    assert unused.exit_code == 1 and "rank is 4, which only method 'lora' uses" in unused.stderr
    refused = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "n.bin")])
    assert refused.exit_code == 1 and "written as .onnx" in refused.stderr


@pytest.mark.parametrize(
    ("base", "output", "settings", "error", "reason"),
    [
        ("plain.edgec", "a.onnx_adapter", {}, PassError, "no slots.*'adapter-slots'"),
        ("slots.edgec", "a.onnx_adapter", {"method": "full"}, PassError, "of method 'lora'"),
        ("slots.edgec", "a.onnx_adapter", {"classes": 3}, PassError, "its own classes"),
        ("slots.edgec", "a.onnx_adapter", {"rank": 3}, PassError, "rank is 3, the slots .* have 2"),
        ("slots.edgec", "a.onnx_adapter", {"replay": 0.5}, PassError, "only a memory uses"),
        ("cnn.onnx", "a.onnx", {"rank": 4}, PassError, "rank is 4, which only method 'lora' uses"),
        ("cnn.onnx", "a.onnx", {"stepz": 4}, RecipeError, "adapt: .*'stepz', did you mean 'steps'"),
        ("cnn.onnx", "a.onnx", {"steps": "4"}, RecipeError, "'steps' is '4', expected a int"),
        ("slots.edgec", "a.onnx_adapter", {"layers": ("depthwise",)}, PassError, "no slot beside"),
        (
            "slots.edgec",
            "a.onnx_adapter",
            {"target": "arm64"},
            PassError,
            "built for target 'x86-64', not",
        ),
        ("slots.edgec", "a.onnx", {}, OutputError, "an adapter is written as .onnx_adapter"),
        ("cnn.onnx", "no/a.onnx", {}, OutputError, "no folder"),
        ("cnn.onnx", "a.onnx", {"data": "test.npz"}, DataError, "the same samples"),
    ],
)
def test_refusals_leave_nothing(work, tmp_path, base, output, settings, error, reason):
    if "data" in settings:
        settings = {"data": work / settings["data"]}
    with pytest.raises(error, match=reason):
        teach(work, base, tmp_path / output, **settings)
    assert not list(tmp_path.iterdir())


def test_refuses_a_reference_that_is_missing_or_another_one(work, tmp_path):
    bundle = tmp_path / "slots.edgec"
    bundle.write_bytes((work / "slots.edgec").read_bytes())
    with pytest.raises(SourceError, match="trained on slots.reference.onnx beside it"):
        adapt(bundle, work / "data.npz", tmp_path / "a.onnx_adapter")
    other, _ = graphs.cnn()
    value = other.graph.initializers["b"]
    value.const_value = ir.tensor(value.const_value.numpy() + 1, name="b")
    ir.save(other, tmp_path / "slots.reference.onnx")
    with pytest.raises(SourceError, match="not the reference that slots.edgec was built from"):
        adapt(bundle, work / "data.npz", tmp_path / "a.onnx_adapter")


def test_the_command_has_every_setting_with_its_own_default():
    own = {field.name: field.default for field in dataclasses.fields(Adapt)}
    options = {option.name: option for option in command.params}
    assert set(own) <= set(options)
    for name, default in own.items():
        option = options[name]
        shown = re.findall(r"\[default: ([^];]+)", option.help or "")
        if isinstance(option.default, float | int | str):
            shown = [option.default]
        said = [str(value).removesuffix(".0") for value in shown]
        assert said in ([], [str(default).removesuffix(".0")]), name


def killed(what: str, done: int, total: int) -> None:
    if done == 25:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("base", "name"), [("cnn.onnx", "a.onnx"), ("slots.edgec", "a.onnx_adapter")]
)
def test_an_interrupted_adaptation_goes_on_to_the_same_bytes(work, tmp_path, base, name):
    whole, halted = (tmp_path / folder for folder in ("whole", "halted"))
    for folder in (whole, halted):
        folder.mkdir()
    teach(work, base, whole / name, steps=30)
    with pytest.raises(KeyboardInterrupt):
        teach(work, base, halted / name, steps=30, progress=killed)
    assert [p.name for p in halted.iterdir()] == [f".{name}.work"]
    made = teach(work, base, halted / name, steps=30)
    assert "went on at step 20 of an interrupted training" in made.findings
    assert [p.name for p in halted.iterdir()] == [name]
    assert (halted / name).read_bytes() == (whole / name).read_bytes()


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(work, tmp_path):
    output, work_folder = tmp_path / "a.onnx", tmp_path / ".a.onnx.work"
    arguments = [str(work / "cnn.onnx"), "--data", str(work / "data.npz"), "-o", str(output)]
    command = [sys.executable, "-m", "edgec", "adapt", *arguments, "--steps", "100000"]
    streams: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # a shell starts what runs in its background, this test perhaps, with SIGINT ignored
    heard = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    started = subprocess.Popen(command, preexec_fn=heard, **streams)
    try:
        until = time.monotonic() + 120
        while not list(work_folder.glob("*.safetensors")) and time.monotonic() < until:
            time.sleep(0.02)
        started.send_signal(signal.SIGINT)
        out, errors = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 1 and not out
    *progress, last = errors.splitlines()
    assert progress == ["edgec: adapt …"], errors
    assert last == (
        f"edgec: interrupted; {output} was not written; the same command goes on from the "
        f"checkpoint in {work_folder}"
    )
    assert [p.name for p in tmp_path.iterdir()] == [".a.onnx.work"]
    steps = []

    def first(what: str, done: int, total: int) -> None:
        steps.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(work / "cnn.onnx", work / "data.npz", output, steps=100_000, progress=first)
    assert steps[0] > 20 and steps[0] % 20 == 1


def test_ctrl_c_before_there_is_a_checkpoint_leaves_nothing(work, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgec.adaptation.load_source", interrupted)
    arguments = [str(work / "cnn.onnx"), "--data", str(work / "data.npz")]
    done = CliRunner().invoke(main, ["adapt", *arguments, "-o", str(tmp_path / "a.onnx")])
    assert done.exit_code == 1 and done.stderr == "edgec: interrupted; nothing was written\n"
    assert not list(tmp_path.iterdir())


def test_an_adaptation_that_is_interrupted_while_it_is_judged_keeps_what_it_learned(
    work, tmp_path, monkeypatch
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("edgec.adaptation_data.Lessons.judged", interrupted)
        teach(work, "cnn.onnx", tmp_path / "a.onnx", steps=30)
    assert [p.name for p in tmp_path.iterdir()] == [".a.onnx.work"]
    trained: list[int] = []
    teach(work, "cnn.onnx", tmp_path / "a.onnx", steps=30, progress=lambda *of: trained.append(1))
    assert not trained and [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_what_was_trained_is_kept_until_it_can_be_written(work, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("edgec.adaptation.save_reference", full)
        reason = "No space left on device; mend that.*from what was trained, in .*a.onnx.work"
        with pytest.raises(OutputError, match=reason):
            teach(work, "cnn.onnx", tmp_path / "a.onnx", steps=30)
    assert [p.name for p in tmp_path.iterdir()] == [".a.onnx.work"]
    trained: list[int] = []
    teach(work, "cnn.onnx", tmp_path / "a.onnx", steps=30, progress=lambda *of: trained.append(1))
    assert not trained and [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


@pytest.mark.parametrize(
    ("base", "output", "folder"),
    [
        ("cnn.onnx", "a.onnx", "a.onnx"),
        ("cnn.onnx", "a.onnx", "a.memory.npz"),
        ("slots.edgec", "a.onnx_adapter", "a.onnx_adapter"),
    ],
)
def test_a_folder_of_the_outputs_name_is_told_before_the_training(
    work, tmp_path, base, output, folder
):
    (tmp_path / folder).mkdir()
    with pytest.raises(OutputError, match=f"{folder}: this is a folder; choose another -o"):
        teach(work, base, tmp_path / output, data=None, remember=2)


def test_a_share_says_of_what_it_is(work, tmp_path):
    made = teach(work, "slots.edgec", tmp_path / "a.onnx_adapter", steps=1)
    entries = {e.name: e.size for e in edgec_runtime.load(work / "slots.edgec").manifest.entries}
    base = entries["weights.bin"] + entries["graph.onnx"]
    assert made.share_of_base == made.written.stat().st_size / base
    assert "over those of the bundle's graph and weights" in made.facts()["share_is"]
    grown = teach(work, "cnn.onnx", tmp_path / "b.onnx", steps=1, classes=20)
    assert 1 < grown.share_of_base < 2
    assert "of the weights before" in grown.facts()["share_is"]
