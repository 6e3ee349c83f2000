"""Instructions are counted by class, alike every time, or the reason is told."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
from collections.abc import Callable

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from devices import bundles

import edgec
from edgec.cli import main
from edgec.devices.check import verify_on
from edgec.devices.connect import open_device
from edgec.devices.counter import HOSTS, counts_between_marks, open_counter
from edgec.devices.install import missing
from edgec.devices.job import Job, Outcome
from edgec.errors import DeviceError
from edgec.targets import load_profile
from edgec_runtime.bundle import read_bundle


def require(*devices: str) -> None:
    for device in devices:
        reason = missing(load_profile(device))
        if reason is not None:
            pytest.skip(f"{device}: {reason}")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return bundles.build("arm64-dotprod", tmp_path_factory.mktemp("dotprod"))


def counted(device: str, bundle: pathlib.Path) -> Outcome:
    require(device)
    with open_device(device) as opened:
        return opened.run(Job(bundle, bundles.samples(1), count=True))


@pytest.mark.slow
def test_counts_repeat_within_one_percent_and_say_which_kernel_ran(bundle: pathlib.Path) -> None:
    first, second = (counted("cortex-a76", bundle).counts for _ in range(2))
    older = counted("cortex-a72", bundle).counts
    assert first is not None and second is not None and older is not None
    for name, number in first.items():
        assert second[name] == pytest.approx(number, rel=0.01), name
    # 4 x 256 x (256 + 64) products, 16 to a dot product: nothing else multiplies
    assert first["dot"] == 4 * 256 * 320 // 16
    assert older["dot"] == 0 and older["widening"] == 4 * 256 * 320 // 8
    assert first["total"] < older["total"]


def test_what_is_not_asked_for_is_not_counted(bundle: pathlib.Path) -> None:
    with open_device("native") as device:
        outcome = device.run(Job(bundle, bundles.samples(1)))
        assert outcome.counts is None and not outcome.uncounted
        asked = device.run(Job(bundle, bundles.samples(1), count=True))
    assert asked.counts is None and "native counts no instructions" in asked.uncounted


@pytest.mark.slow
def test_without_a_compiler_the_verdict_passes_and_says_why_there_are_no_counts(
    bundle: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    require("cortex-a76")
    from edgec.devices import counter

    monkeypatch.setattr(counter, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(counter.shutil, "which", lambda name: None)
    [verdict] = verify_on(bundle, ["cortex-a76"])
    assert verdict.status == "passed"
    assert "not counted" in verdict.reason and "install a C compiler" in verdict.reason
    assert verdict.outcome is not None and verdict.outcome.counts is None


def test_a_counter_that_does_not_compile_or_load_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    if shutil.which("cc") is None:
        pytest.skip("there is no cc")
    from edgec.devices import counter

    monkeypatch.setenv("EDGEC_DEVICES", str(tmp_path / "cache"))
    refusing = open_counter("arm64", "false", (), {})
    assert not refusing.options and "the counter cannot be loaded" in refusing.reason
    assert len(list((tmp_path / "cache" / "counters").iterdir())) == 1  # compiled, and kept
    assert "no counter for riscv64" in open_counter("riscv64", "true", (), {}).reason
    (tmp_path / "count_arm64.c").write_text("int broken(")
    monkeypatch.setattr(counter, "HOSTS", tmp_path)
    assert "cannot compile count_arm64.c" in open_counter("arm64", "true", (), {}).reason
    assert len(list((tmp_path / "cache" / "counters").iterdir())) == 1


def test_counts_are_what_lies_between_the_marks() -> None:
    log = "noise edgec-count 1 total=5 dot=1\nmore\nedgec-count 2 total=12 dot=3\n"
    assert counts_between_marks(log) == {"total": 7, "dot": 2}
    with pytest.raises(DeviceError, match="did not see the guest's marks"):
        counts_between_marks("edgec-count 1 total=5\n")


WORDS = {  # as LLVM's assembler encodes them; the comment names what is easily mistaken
    "dot": "4E839441 2E839441 4E839C41 4F83E841 6FB3E041 4FA3F841 4F03F041",
    "i8mm": "4E83A441 6E83A441 4E83AC41",
    "bf16": "6E43EC41 6E43FC41 4F63F041 2EC3FC41 4FD3F841",
    "fma_fp32": "4E23CC41 0EA3CC41 4FB31841 4F835041 1F031041 1F239041",
    "fma_fp16": "4E430C41 0EC30C41 4F331841 4F135041 1FC31041 4E23EC41 6E23CC41 4EA3EC41",
    "widening": "0E238041 6E638041 0EA3A041 2E23C041 4E63C041 0F632041 6F736841 0F63A041",
    # fmla 2d, fmadd d, mla, sqdmlal, fmulx, sabal, pmull, add
    "simd": "4E63CC41 1F431041 4EA39441 0E639041 4E23DC41 0E235041 0E23E041 4EA38441 4E030041",
    "load_store": "F9400441 AD400861 4C007841 4D40C841 A9BF0BE1 C85FFC41 C8A17C62 3CE36841",
    "sve": "65A30041 A540A021 44830041 2598E3E0",
    "sme": "80822020 A0822020",
    "total": "8B030041 D503201F D65F03C0 9B031041 54000040",  # add nop ret madd b.eq
}
HARNESS = """
#include "count_arm64.c"
#include <stdlib.h>
void qemu_plugin_register_vcpu_tb_trans_cb(
    plugin_id i, void (*f)(plugin_id, struct qemu_plugin_tb *)) { (void)i; (void)f; }
void qemu_plugin_register_vcpu_tb_exec_inline(
    struct qemu_plugin_tb *b, int o, void *p, uint64_t n) { (void)b; (void)o; (void)p; (void)n; }
void qemu_plugin_register_vcpu_syscall_cb(
    plugin_id i, void (*f)(plugin_id, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                           uint64_t, uint64_t, uint64_t, uint64_t)) { (void)i; (void)f; }
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *b) { (void)b; return 0; }
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *b, size_t i)
{ (void)b; (void)i; return NULL; }
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *i) { return i; }
int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        uint64_t numbers[CLASSES] = {0};
        int last = 0;
        classify((uint32_t)strtoul(argv[i], NULL, 16), numbers);
        for (int class = 0; class < CLASSES; class++)
            if (numbers[class])
                last = class;
        puts(names[last]);
    }
    return 0;
}
"""


def test_every_encoding_falls_into_its_class(tmp_path: pathlib.Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no cc")
    program = tmp_path / "classes"
    (tmp_path / "classes.c").write_text(HARNESS)
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{HOSTS}", "-o", str(program)]
    subprocess.run([compiler, *flags, str(tmp_path / "classes.c")], check=True)
    for name, words in WORDS.items():
        done = subprocess.run([program, *words.split()], capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == {name}, words


@pytest.mark.slow
def test_the_command_prints_counts_the_kernel_and_an_estimate(
    bundle: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    require("cortex-a76")
    file = tmp_path / "board.json"
    arguments = ["bench", str(bundle), "--on", "cortex-a76"]
    recorded = CliRunner().invoke(main, [*arguments, "--on", "native", "--record", str(file)])
    assert recorded.exit_code == 0, recorded.output
    words = " ".join(recorded.stdout.split())
    assert "int8 dot product" in words and "int8 runs by kernels made for it" in words
    shown = CliRunner().invoke(main, [*arguments, "--estimate", str(file), "--json"])
    [found] = json.loads(shown.stdout)
    ours, reference = found["models"]
    assert ours["instructions"]["dot"] == 4 * 256 * 320 // 16
    assert reference["instructions"]["fma_fp32"] == 4 * 256 * 320 // 4
    assert found["ratio"] < 1 and ours["latency_ms"] is None
    assert ours["estimate_ms"] > 0 and "too few models" in found["notes"][-1]


def convolutional() -> tuple[ir.Model, dict[str, tuple[int, ...]]]:
    text = """cnn (float[1, 16, 24, 24] x) => (float[1, 64, 12, 12] y) {
        [stem] a = Conv <pads = [1, 1, 1, 1]> (x, k1)
        r = Relu (a)
        [wide] b = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r, k2)
        s = Relu (b)
        [point] y = Conv (s, k3)
    }"""
    shapes = {"k1": (64, 16, 3, 3), "k2": (64, 64, 3, 3), "k3": (64, 64, 1, 1)}
    weights = {
        name: graphs.weight(*shape, seed=number) / np.float32(np.sqrt(shape[1]))
        for number, (name, shape) in enumerate(shapes.items())
    }
    return graphs.graph(text, weights), {"x": (1, 16, 24, 24)}


def transformer() -> tuple[ir.Model, dict[str, tuple[int, ...]]]:
    text = """mlp (float[32, 256] x) => (float[32, 256] y) {
        [up] a = MatMul (x, k1)
        g = Gelu (a)
        [down] b = MatMul (g, k2)
        y = Add (x, b)
    }"""
    weights = {"k1": graphs.weight(256, 512) / 2, "k2": graphs.weight(512, 256, seed=1)}
    return graphs.graph(text, weights), {"x": (32, 256)}


def recurrent() -> tuple[ir.Model, dict[str, tuple[int, ...]]]:
    text = """lstm (float[12, 1, 128] x) => (float[12, 128] y) {
        [lstm] h = LSTM <hidden_size = 128> (x, w, r)
        flat = Reshape (h, shape)
        [head] y = MatMul (flat, k)
    }"""
    weights = {
        "w": graphs.weight(1, 512, 128),
        "r": graphs.weight(1, 512, 128, seed=1),
        "k": graphs.weight(128, 128, seed=2),
        "shape": np.array([12, 128]),
    }
    return graphs.graph(text, weights), {"x": (12, 1, 128)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "graphs_differ"),
    # ranges taken at run time are the cheapest for products and LSTM on both CPUs
    [(convolutional, True), (transformer, False), (recurrent, False)],
)
def test_each_target_is_the_cheaper_one_on_its_own_cpu(
    make: Callable[[], tuple[ir.Model, dict[str, tuple[int, ...]]]],
    graphs_differ: bool,
    tmp_path: pathlib.Path,
) -> None:
    own = {"arm64": "cortex-a72", "arm64-dotprod": "cortex-a76"}
    require(*own.values())
    model, shapes = make()
    ir.save(model, tmp_path / "model.onnx")

    def samples(first: int, last: int) -> Callable[[], list[dict[str, np.ndarray]]]:
        return lambda: [
            {name: graphs.feed(*shape, seed=seed) for name, shape in shapes.items()}
            for seed in range(first, last)
        ]

    totals, files = {}, {}
    for target in own:
        built = tmp_path / f"{target}.edgec"
        options = {"calibration": samples(2, 18), "evaluation": samples(0, 1), "verify": False}
        edgec.build(tmp_path / "model.onnx", target=target, output=built, **options)
        entries = {e.name: e.sha256 for e in read_bundle(built).manifest.entries}
        files[target] = entries["graph.onnx"], entries["weights.bin"]
        for verdict in verify_on(built, list(own.values()), any_target=True):
            assert verdict.status == "passed", verdict.reason
            assert verdict.outcome is not None and verdict.outcome.counts is not None
            totals[target, verdict.device] = verdict.outcome.counts["total"]
    assert (files["arm64"] != files["arm64-dotprod"]) == graphs_differ
    for target, cpu in own.items():
        # counts repeat within 1 %
        assert totals[target, cpu] <= 1.01 * min(totals[other, cpu] for other in own)
