"""Trainings on two processes of torchrun, and trainings and builds that are killed with -9."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import graphs
import numpy as np
import onnx_ir as ir
import pytest
import safetensors
import trainings_together

from edgec.passes import PassError
from edgec.passes.lesson import train
from edgec.passes.torch_graph import to_torch
from edgec.passes.training_task import Task
from edgec.passes.workers import Workers

SCRIPT = pathlib.Path(trainings_together.__file__)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
ALL = ("replicated", "recomputed", "sharded", "uneven")
_NOISE = 1e-4  # of float32 sums in another order, which Adam's division may enlarge


def torchrun(folder: pathlib.Path, step: int, *names: str) -> subprocess.CompletedProcess[str]:
    """Trainings by trainings_together.py on two processes, on a port that is free."""
    launch = [*TORCHRUN, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.run(
        [*launch, str(SCRIPT), str(folder), str(step), *names],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def printed(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, object]]:
    assert done.returncode == 0, done.stderr
    return {found["way"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> dict[str, dict[str, object]]:
    """What two processes print of every way to train."""
    return printed(torchrun(tmp_path_factory.mktemp("together"), 0, *ALL))


@pytest.mark.slow
@pytest.mark.parametrize("way", ALL)
def test_two_processes_have_the_loss_curve_of_one(together, way):
    _, context = trainings_together.student()
    alone = trainings_together.outcome_of(way, context)
    assert together[way]["losses"] == pytest.approx(alone["losses"], rel=_NOISE)
    assert together[way]["after"] == pytest.approx(alone["after"], rel=_NOISE)
    assert alone["losses"][-1] < alone["losses"][0]
    assert len(alone["losses"]) == 12


@pytest.mark.slow
def test_a_sharded_student_is_held_in_parts(together):
    held, parameters = together["sharded"]["held"]
    assert parameters / 2 <= held < 0.6 * parameters  # a tensor of odd length has a larger half
    assert together["replicated"]["held"] == [parameters, parameters]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["replicated", "sharded"])
def test_killed_at_a_random_step_two_processes_go_on_to_the_same_bytes(together, tmp_path, way):
    step = random.Random(way).randint(4, 11)
    killed = torchrun(tmp_path, step, way)
    assert killed.returncode != 0 and not killed.stdout
    again = printed(torchrun(tmp_path, 0, way))[way]
    assert again["digest"] == together[way]["digest"]
    assert again["losses"] == together[way]["losses"]
    saved = (step - 1) // 3 * 3
    assert again["findings"] == [f"went on at step {saved} of an interrupted training"]


def source(folder: pathlib.Path) -> list[str]:
    """An .onnx file with calibration data in a folder, as arguments of `edgec build`."""
    model, _ = graphs.cnn()
    ir.save(model, folder / "cnn.onnx")
    images = np.concatenate([graphs.feed(1, 4, 12, 12, seed=i) for i in range(24)])
    np.savez(folder / "data.npz", x=images[:, None])
    recipe = "cleanup,fuse,quantize-static,recover,lower"
    chosen = ["steps=80", "rate=0.05", "bias_rate=0.001", "save_every=1"]
    options = [part for text in chosen for part in ("--set", f"recover.{text}")]
    data = ["--calibration", str(folder / "data.npz"), "--recipe", recipe]
    return [str(folder / "cnn.onnx"), "--target", "x86-64", *data, *options, "--no-verify"]


def build(arguments: list[str], output: pathlib.Path, processes: int) -> subprocess.Popen[str]:
    """`edgec build`, by itself or under torchrun."""
    free = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    launch = [*TORCHRUN, *free, "-m", "edgec"] if processes > 1 else [sys.executable, "-m", "edgec"]
    return subprocess.Popen(
        [*launch, "build", *arguments, "-o", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
    )


def finished(process: subprocess.Popen[str]) -> str:
    """What a build prints to stdout; its figures are not judged here."""
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    listed = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in listed for child in file.read_text().split()]


def kill_at(process: subprocess.Popen[str], folder: pathlib.Path, step: int) -> None:
    """Kill a build and what it started as soon as its checkpoint is of that step."""
    ends = time.monotonic() + 100
    while time.monotonic() < ends and process.poll() is None:
        for file in folder.glob(".*.work/recover-*.safetensors"):
            with safetensors.safe_open(file, framework="np") as archive:
                progress = json.loads(archive.metadata()["progress"])
            if progress["step"] >= step:
                assert not progress["ended"], "too late"
                for pid in (process.pid, *children(process.pid)):
                    os.kill(pid, signal.SIGKILL)
                process.communicate()
                return
        time.sleep(0.002)
    raise AssertionError(process.communicate()[1])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_build_killed_at_a_random_step_ends_with_the_same_bytes(tmp_path, processes):
    arguments = source(tmp_path)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    out = finished(build(arguments, straight, processes))
    assert out.count("cnn for x86-64") == 1  # printed once, by process 0
    kill_at(build(arguments, resumed, processes), resumed, random.Random(processes).randint(5, 50))
    assert not list(resumed.glob("*.edgec"))
    finished(build(arguments, resumed, processes))
    name = "cnn.x86-64.edgec"
    assert (resumed / name).read_bytes() == (straight / name).read_bytes()
    report = json.loads((resumed / "report.json").read_text())
    findings = [f for step in report["steps"] for f in step["findings"]]
    assert any("of an interrupted training" in finding for finding in findings)
    assert sorted(f.name for f in resumed.iterdir()) == sorted(f.name for f in straight.iterdir())


@pytest.mark.slow
def test_what_goes_wrong_is_told_once_and_ends_all_processes(tmp_path):
    arguments = source(tmp_path)
    arguments[arguments.index("recover.steps=80")] = "recover.batch=1"
    process = build(arguments, tmp_path / "build", 2)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    told = "edgec: recover: a batch of 1 samples cannot be shared by 2 processes"
    assert errors.count(told) == 1 and not out
    assert not (tmp_path / "build").exists()


def test_every_process_has_a_share_and_as_many_stacks_as_any():
    stacks = list("abcdefg")
    shares = [Workers(rank, 3).share(stacks) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 3]
    assert sorted(s for share in shares for s, counts in share if counts) == stacks
    assert Workers().share(stacks) == [(stack, True) for stack in stacks]


def test_a_batch_that_is_too_small_for_the_processes_is_refused():
    model, context = trainings_together.student()
    small = dataclasses.replace(trainings_together.ways()["replicated"], batch=2, micro_batch=0)
    context = dataclasses.replace(context, workers=Workers(0, 3))
    with pytest.raises(PassError, match="a batch of 2 samples cannot be shared by 3 processes"):
        train(to_torch(model), model, context, small)


def test_a_task_comes_back_from_its_files_as_it_was(tmp_path):
    model, context = trainings_together.student()
    labels = [{"label": np.array([i])} for i in range(14)]
    context = dataclasses.replace(context, calibration_labels=labels)
    task = Task.of(model, context, trainings_together.ways()["uneven"])
    task.write(tmp_path)
    again = Task.read(tmp_path)
    assert again.digests() == task.digests()
    assert again.settings == task.settings
    assert [int(s.labels["label"][0]) for s in again.samples] == list(range(14))
    assert len(again.held_out) == 6 and not again.held_out[0].labels
