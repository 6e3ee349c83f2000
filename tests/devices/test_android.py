"""``edgec mobile``: ONNX Runtime's own format, accelerators, and native libraries of an app."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import struct
import subprocess

import numpy as np
import onnxruntime
import pytest
from bundle_samples import write_sample
from click.testing import CliRunner
from devices import bundles

import edgec_runtime
from edgec.cli import main
from edgec.devices import android
from edgec.devices.android import check_mobile
from edgec.devices.android_elf import read_library
from edgec.errors import BundleError, OutputError, SourceError, TargetMismatchError
from edgec_runtime.manifest import Target


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return bundles.build("android", tmp_path_factory.mktemp("bundle"))


def elf(*aligns: int, bits: int = 64, kind: int = 3, machine: int = 183) -> bytes:
    """A shared library of nothing but headers: one segment to load for each alignment."""
    start = 64 if bits == 64 else 52
    size = 56 if bits == 64 else 32
    identity = b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9)
    layout = "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH"
    fields = (kind, machine, 1, 0, start, 0, 0, start, size, len(aligns), 0, 0, 0)
    header = struct.pack(layout, *fields)
    if bits == 64:
        segments = [struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 0, 0, align) for align in aligns]
    else:
        segments = [struct.pack("<IIIIIIII", 1, 0, 0, 0, 0, 0, 5, align) for align in aligns]
    return identity + header + b"".join(segments)


@pytest.mark.parametrize(
    ("data", "bits", "align", "loads"),
    [
        (elf(16384), 64, 16384, True),
        (elf(65536, 65536), 64, 65536, True),
        (elf(16384, 4096), 64, 4096, False),
        (elf(4096, bits=32, machine=40), 32, 4096, True),
    ],
)
def test_a_library_loads_if_every_segment_is_aligned(
    tmp_path: pathlib.Path, data: bytes, bits: int, align: int, loads: bool
) -> None:
    (tmp_path / "a.so").write_bytes(data.ljust(100, b"\0"))
    library = read_library(tmp_path / "a.so")
    assert (library.bits, library.align_bytes, library.loads_with_16k_pages) == (bits, align, loads)
    assert library.arch == ("arm64" if bits == 64 else "armv7")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no library of Android"),
        (b"\x7fELF" + bytes(10), "no library of Android"),
        (b"MZ" + bytes(100), "no library of Android"),
        (elf(16384).replace(b"\x02\x01\x01", b"\x02\x02\x01", 1), "no library of Android"),
        (elf(16384, kind=2), "no shared library"),
        (elf(16384)[:-1], "program headers lie outside"),
        (elf(), "nothing to load"),
        (elf(16384).replace(struct.pack("<IIQ", 1, 5, 0), struct.pack("<IIQ", 1, 5, 1)),
         "contradicts its alignment"),
    ],
)  # fmt: skip
def test_what_is_no_library_is_refused(tmp_path: pathlib.Path, data: bytes, message: str) -> None:
    (tmp_path / "a.so").write_bytes(data)
    with pytest.raises(SourceError, match=message):
        read_library(tmp_path / "a.so")


def test_a_missing_library_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(SourceError, match=r"none\.so: cannot be read: No such file"):
        read_library(tmp_path / "none.so")


def test_a_linked_library_has_the_alignment_that_the_linker_was_told(
    tmp_path: pathlib.Path,
) -> None:
    if shutil.which("cc") is None:
        pytest.skip("there is no cc on this machine")
    (tmp_path / "a.c").write_text("int one(void) { return 1; }")
    for pages in (4096, 16384):
        goal = tmp_path / f"{pages}.so"
        linked = ["cc", "-shared", f"-Wl,-z,max-page-size={pages}", str(tmp_path / "a.c")]
        subprocess.run([*linked, "-o", str(goal)], check=True)
        assert read_library(goal).align_bytes == pages


def test_real_libraries_are_read_as_readelf_reads_them() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("there is no readelf on this machine")
    capi = pathlib.Path(onnxruntime.__file__).parent / "capi"
    found = sorted(capi.glob("*.so*"))
    if not found:
        pytest.skip("this onnxruntime package has no ELF files")
    for path in found:
        listed = subprocess.check_output(["readelf", "-lW", str(path)], text=True)
        aligns = [int(a, 16) for a in re.findall(r"^ +LOAD .* (0x[0-9a-f]+)$", listed, re.M)]
        assert read_library(path).align_bytes == min(aligns)


def test_a_bundle_is_converted_and_gives_the_same_outputs(
    bundle: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    found = check_mobile(bundle, output=tmp_path / "out")
    assert found.equal
    converted, config = found.written
    assert converted.name == "mlp.ort" and converted.stat().st_size == found.ort_bytes
    session = onnxruntime.InferenceSession(str(converted), providers=["CPUExecutionProvider"])
    [feeds] = bundles.samples(1)
    expected = edgec_runtime.load(bundle, any_target=True)(**feeds)["y"]
    np.testing.assert_array_equal(session.run(["y"], feeds)[0], expected)
    text = config.read_text()
    assert text.splitlines()[1] == "# - mlp.ort"  # no path of this machine
    assert found.operators and all(op.split("::")[1] in text for op in found.operators)
    assert not any("nchwc" in op for op in found.operators)


def test_accelerators_are_judged_in_words(bundle: pathlib.Path) -> None:
    usability = {u.provider: u for u in check_mobile(bundle).usability}
    assert set(usability) == {"NNAPI", "CoreML NeuralNetwork", "CoreML MLProgram"}
    coreml = usability["CoreML MLProgram"]
    assert coreml.verdict == "no" and coreml.taken < coreml.nodes
    assert re.match(r"no: \d+ of \d+ nodes in \d+ parts?; it lacks ai\.onnx:", coreml.words())


def test_a_bundle_of_another_instruction_set_is_refused(tmp_path: pathlib.Path) -> None:
    path = bundles.build("x86-64", tmp_path)
    with pytest.raises(TargetMismatchError, match="phones are arm64: build it with --target andr"):
        check_mobile(path)


def test_a_graph_that_computes_something_else_is_refused(
    bundle: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(path: object, *arguments: object, **options: object) -> object:
        model = real(path, *arguments, **options)
        monkeypatch.setattr(model, "run", lambda names, feeds: [np.zeros((4, 64), np.float32)])
        return model

    real = onnxruntime.InferenceSession
    model = edgec_runtime.load(bundle, any_target=True)
    monkeypatch.setattr(edgec_runtime, "load", lambda path, **options: model)
    monkeypatch.setattr(onnxruntime, "InferenceSession", shifted)
    with pytest.raises(BundleError, match=r"it computes something else \(0.0 dB"):
        check_mobile(bundle)


def test_a_graph_that_cannot_be_converted_is_one_clear_error(
    bundle: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(android.Bundle, "graph", lambda self, role="main": b"\x08\x07")
    with pytest.raises(BundleError, match="ONNX Runtime cannot convert it"):
        check_mobile(bundle)


def test_a_folder_that_cannot_be_written_is_named(
    bundle: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write to .*file"):
        check_mobile(bundle, output=tmp_path / "file")


def test_the_command_fails_for_a_library_that_does_not_load(
    bundle: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for name, align in (("good.so", 16384), ("bad.so", 4096)):
        (tmp_path / name).write_bytes(elf(align))
    command = ["mobile", str(bundle), "--json", "--library", str(tmp_path / "good.so")]
    good = CliRunner().invoke(main, command)
    assert good.exit_code == 0, good.output
    [library] = json.loads(good.stdout)["libraries"]
    assert library["loads_with_16k_pages"] and library["aligned_to"] == 16384
    bad = CliRunner().invoke(main, [*command, "--library", str(tmp_path / "bad.so")])
    assert bad.exit_code == 1
    assert "bad.so: its segments are aligned to 4096 bytes" in bad.stderr
    assert "max-page-size=16384" in bad.stderr and "good.so:" not in bad.stderr


def test_a_bundle_without_a_golden_sample_is_refused(tmp_path: pathlib.Path) -> None:
    path = write_sample(tmp_path / "a", target=Target("android", "arm64", ("android",)))
    with pytest.raises(BundleError, match="sample"):
        check_mobile(path)
