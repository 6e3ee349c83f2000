"""Loading a bundle: where the file may be, which machine it fits, what a session is told."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
import weakref

import numpy as np
import onnxruntime
import pytest
from bundle_samples import WEIGHT, chain_graph, forge, sample_manifest, write_sample

import edgec_runtime
from edgec_runtime import bundle, manifest, session
from edgec_runtime.errors import BundleError, EdgecError, InputError, TargetMismatchError
from edgec_runtime.versions import version_matches

X = np.random.default_rng(1).standard_normal((3, 8), dtype=np.float32)


def assert_works(path: pathlib.Path, **options: object) -> edgec_runtime.Model:
    model = edgec_runtime.load(path, **options)  # type: ignore[arg-type]
    # float32 sums of 8 products in another order: 1e-5 is a hundred times their rounding
    np.testing.assert_allclose(model(x=X)["y"], X @ WEIGHT, atol=1e-5)
    return model


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return write_sample(tmp_path / "sample.edgec")


def test_a_renamed_bundle_works(path: pathlib.Path) -> None:
    for name in ("b.edgec", "umlaut ä 狗.bin", "n" * 255):
        path = path.rename(path.with_name(name))
        assert_works(path)
        assert_works(path, mapped=True)


def test_a_moved_linked_and_read_only_bundle_works(
    path: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "other folder"
    folder.mkdir()
    moved = path.rename(folder / "moved.edgec")
    (tmp_path / "link.edgec").symlink_to(moved)
    (tmp_path / "link.to.link").symlink_to("link.edgec")
    (tmp_path / "folder.link").symlink_to(folder)
    os.link(moved, tmp_path / "hard.edgec")
    moved.chmod(0o444)
    folder.chmod(0o555)
    monkeypatch.chdir(folder)
    for name in ("link.edgec", "link.to.link", "folder.link/moved.edgec", "hard.edgec"):
        assert_works(tmp_path / name)
    assert assert_works(pathlib.Path("moved.edgec")).path == moved.resolve()
    folder.chmod(0o755)


def test_a_bundle_that_is_replaced_or_removed_keeps_running(path: pathlib.Path) -> None:
    model = assert_works(path, mapped=True)
    write_sample(path, {"extra": b"1"})
    np.testing.assert_allclose(model(X)["y"], X @ WEIGHT, atol=1e-5)
    path.unlink()
    np.testing.assert_allclose(model(X)["y"], X @ WEIGHT, atol=1e-5)


def test_the_model_tells_what_it_is(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = edgec_runtime.load(write_sample(tmp_path / "l.edgec", labels=("a", "b")), threads=2)
    assert model.inputs == (manifest.Value("x", "float32", ("batch", 8)),)
    assert [v.name for v in model.outputs] == ["y"]
    assert (model.labels, model.threads, model.manifest.name) == (("a", "b"), 2, "sample")
    assert repr(model).startswith("<Model sample version 1 for here from ")
    assert edgec_runtime.load(path).labels is None


@pytest.mark.parametrize(
    ("arch", "systems", "message"),
    [
        ("riscv64", ("linux",), r"built for board \(riscv64; linux\), this is "),
        (None, ("browser", "ios"), r"; browser, ios\), this is .*any_target=True"),
    ],
)
def test_another_machine_is_refused(
    tmp_path: pathlib.Path, arch: str | None, systems: tuple[str, ...], message: str
) -> None:
    here = sample_manifest().target.arch
    target = manifest.Target("board", arch or here, systems)
    path = write_sample(tmp_path / "a", target=target)
    with pytest.raises(TargetMismatchError, match=message):
        edgec_runtime.load(path)
    assert_works(path, any_target=True)


def test_threads_come_from_argument_environment_manifest(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDGEC_THREADS", raising=False)
    path = write_sample(tmp_path / "a", session=manifest.Session(threads=3))
    assert edgec_runtime.load(path).threads == 3
    monkeypatch.setenv("EDGEC_THREADS", "2")
    model = edgec_runtime.load(path)
    assert model.threads == 2
    assert model._session.get_session_options().intra_op_num_threads == 2
    assert edgec_runtime.load(path, threads=1).threads == 1
    assert edgec_runtime.load(path, threads=0).threads == 0


@pytest.mark.parametrize("text", ["two", "-1", "1.5", " 2", "9999", "²"])
def test_a_wrong_thread_count_is_refused(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("EDGEC_THREADS", text)
    with pytest.raises(EdgecError, match=f"EDGEC_THREADS is '{text}', expected a whole number"):
        edgec_runtime.load(path)
    with pytest.raises(EdgecError, match="threads is -1, expected a whole number from 0 to 1024"):
        edgec_runtime.load(path, threads=-1)
    with pytest.raises(EdgecError, match="threads is True"):
        edgec_runtime.load(path, threads=True)


def test_an_empty_thread_variable_counts_as_unset(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEC_THREADS", "")
    assert edgec_runtime.load(path).threads == 1


@pytest.mark.parametrize(
    ("version", "wanted", "matches"),
    [
        ("1.27.0", ">=1.27,<2", True),
        ("1.31.1", ">=1.27,<2", True),
        ("2.0.0", ">=1.27,<2", False),
        ("2.0.0rc1", "<2", False),
        ("1.9.0", ">=1.10", False),
        ("1.32.0.dev20250101", ">1.31, !=1.33", True),
        ("1.31.1", "==1.31.1", True),
        ("1.31.1", "!=1.31.1", False),
        ("1.31", "<=1.31.0", True),
    ],
)
def test_version_ranges(version: str, wanted: str, matches: bool) -> None:
    assert version_matches(version, wanted) is matches


def test_another_onnxruntime_is_refused(tmp_path: pathlib.Path) -> None:
    path = write_sample(tmp_path / "a", onnxruntime=">=9.5")
    installed = onnxruntime.__version__
    with pytest.raises(BundleError, match=f"needs onnxruntime >=9.5, installed is {installed}"):
        edgec_runtime.load(path)
    path = write_sample(tmp_path / "a", onnxruntime="~=1.27")
    with pytest.raises(BundleError, match="'~=1.27' is not a version range"):
        edgec_runtime.load(path)


def test_a_provider_that_is_not_there_is_an_error(tmp_path: pathlib.Path) -> None:
    settings = manifest.Session(providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    path = write_sample(tmp_path / "a", session=settings)
    with pytest.raises(EdgecError, match="needs the execution provider 'CUDAExecutionProvider'"):
        edgec_runtime.load(path)


def test_any_target_leaves_out_a_provider_that_is_not_there(tmp_path: pathlib.Path) -> None:
    settings = manifest.Session(providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    path = write_sample(tmp_path / "a", session=settings)
    model = assert_works(path, any_target=True)
    assert model.providers == ("CPUExecutionProvider",)
    path = write_sample(
        tmp_path / "b", session=manifest.Session(providers=("CUDAExecutionProvider",))
    )
    with pytest.raises(EdgecError, match="needs the execution provider 'CUDAExecutionProvider'"):
        edgec_runtime.load(path, any_target=True)


def test_a_provider_that_does_not_start_is_an_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ONNX Runtime leaves such a provider out with no more than a warning
    wanted = ("OpenVINOExecutionProvider", "CPUExecutionProvider")
    path = write_sample(tmp_path / "a", session=manifest.Session(providers=wanted))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(wanted))
    made = onnxruntime.InferenceSession
    asked: list[object] = []

    def without_it(graph: object, options: object, *, providers: list[object], **rest: object):  # type: ignore[no-untyped-def]
        asked.extend(providers)
        return made(graph, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", without_it)
    with pytest.raises(EdgecError, match="'OpenVINOExecutionProvider' is installed but does not"):
        edgec_runtime.load(path, threads=3)
    # it would take every core unless told the number
    assert asked == [(wanted[0], {"num_of_threads": "3"}), (wanted[1], {})]


def test_session_entries_follow_manifest_machine_and_mapping(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = manifest.Session(
        config={"session.set_denormal_as_zero": "1"},
        without={
            "vnni": {"session.x64quantprecision": "1"},
            "here": {"session.disable_quant_qdq": "1"},
        },
        disabled_optimizers=("SkipLayerNormFusion",),
    )
    path = write_sample(tmp_path / "a", session=settings)
    machine = session.this_machine()
    fake = type(machine)(machine.arch, machine.os, frozenset({"here"}))
    monkeypatch.setattr(session, "this_machine", lambda: fake)

    def entry(model: edgec_runtime.Model, key: str) -> str | None:
        try:
            return model._session.get_session_options().get_session_config_entry(key)
        except RuntimeError:
            return None

    plain, mapped = assert_works(path), assert_works(path, mapped=True)
    for model in (plain, mapped):
        assert entry(model, "session.set_denormal_as_zero") == "1"
        assert entry(model, "session.x64quantprecision") == "1"
        assert entry(model, "session.disable_quant_qdq") is None
    assert entry(plain, "session.disable_prepacking") is None
    assert entry(mapped, "session.disable_prepacking") == "1"


def test_what_onnxruntime_refuses_is_one_line(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, graph in enumerate(
        [b"\x08\x0a", chain_graph([(8, 4)]).replace(b"MatMul", b"NatMul")]
    ):
        path = forge(tmp_path / f"a{number}", graph=graph)
        with pytest.raises(BundleError, match="ONNX Runtime refuses it: ") as caught:
            edgec_runtime.load(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_provider_that_fails_prints_no_banner(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("the driver\nis missing")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", fail)
    with pytest.raises(BundleError, match="refuses it: the driver is missing"):
        edgec_runtime.load(path)
    assert capfd.readouterr() == ("", "")


def test_a_signature_other_than_the_manifest_is_refused(tmp_path: pathlib.Path) -> None:
    graph = manifest.Graph(
        "graph.onnx",
        (manifest.Value("x", "float16", ("n", 8)),),
        sample_manifest().graphs["main"].outputs,
    )
    path = write_sample(tmp_path / "a", graphs={"main": graph})
    with pytest.raises(BundleError, match="inputs of its graph are .*float32.*says .*float16"):
        edgec_runtime.load(path)


def test_what_fails_while_running_is_one_line(tmp_path: pathlib.Path) -> None:
    value = manifest.Value("x", "float32", ("batch", None))  # the graph wants 8
    graph = manifest.Graph("graph.onnx", (value,), sample_manifest().graphs["main"].outputs)
    model = edgec_runtime.load(write_sample(tmp_path / "a", graphs={"main": graph}))
    with pytest.raises(InputError, match="cannot run these inputs: .*") as caught:
        model(np.zeros((1, 7), np.float32))
    assert "\n" not in str(caught.value)


def test_threads_share_one_model(path: pathlib.Path) -> None:
    model = edgec_runtime.load(path)
    wrong: list[int] = []

    def work(seed: int) -> None:
        x = np.random.default_rng(seed).standard_normal((5, 8), dtype=np.float32)
        expected = x @ WEIGHT
        for _ in range(200):
            if not np.allclose(model(x)["y"], expected, atol=1e-5):
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


_FORKED: edgec_runtime.Model | None = None


def _in_child() -> None:
    global _FORKED
    assert _FORKED is not None
    message = ""
    try:
        _FORKED(X)
    except EdgecError as error:  # pytest.raises would keep the model alive
        message = str(error)
    assert "loaded before this process was forked" in message
    path, session = _FORKED.path, weakref.ref(_FORKED)
    _FORKED = None
    gc.collect()  # destroys the parent's model: must not crash
    assert session() is None
    model = edgec_runtime.load(path, threads=2)
    assert model(X)["y"].shape == (3, 4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_and_does_not_crash(path: pathlib.Path) -> None:
    global _FORKED
    _FORKED = edgec_runtime.load(path, threads=4)  # with four, destruction crashed each time
    _FORKED(X)
    child = multiprocessing.get_context("fork").Process(target=_in_child)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert_works(path)
    _FORKED = None


def test_nothing_is_printed(path: pathlib.Path) -> None:
    code = f"import edgec_runtime; edgec_runtime.load({str(path)!r})([[0.0] * 8])"
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            code.replace("[[0.0] * 8]", "__import__('numpy').zeros((1, 8), 'f4')"),
        ],
        capture_output=True,
        check=True,
    )
    assert (result.stdout, result.stderr) == (b"", b"")


def test_a_bundle_without_the_main_graph_is_refused(tmp_path: pathlib.Path) -> None:
    graphs = {"decode": sample_manifest().graphs["main"]}
    path = write_sample(tmp_path / "a", graphs=graphs)
    assert bundle.read_bundle(path).manifest.graphs.keys() == {"decode"}
    with pytest.raises(BundleError, match="it has no graph 'main'; it has decode"):
        edgec_runtime.load(path)
