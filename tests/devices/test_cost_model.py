"""From counts to milliseconds: known costs are found again, and the error is told honestly."""

from __future__ import annotations

import json
import pathlib
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from devices import bundles

from edgec.cli import main
from edgec.devices.cost import DeviceCost, ModelCost, cost_on, kernels_in_words, records_of
from edgec.devices.cost_model import CLASSES, Measured, fit
from edgec.devices.record import DeviceRecords, Record, add_records, read_records
from edgec.errors import DataError

NANOSECONDS = {"load_store": 0.4, "fma_fp32": 0.25, "dot": 0.5, "other simd": 0.3, "rest": 0.2}


def counts(**given: int) -> dict[str, int]:
    return {**dict.fromkeys(CLASSES, 0), **given}


def made_up(number: int, noise: float = 0.0) -> list[Measured]:
    """Models with random numbers of instructions on a device of known costs."""
    rng = np.random.default_rng(0)
    models = []
    for _ in range(number):
        memory, fma, dot, simd, rest = rng.integers(1e6, 9e7, 5).tolist()
        costs = dict(zip(NANOSECONDS, (memory, fma, dot, simd, rest), strict=True))
        milliseconds = sum(NANOSECONDS[name] * n for name, n in costs.items()) / 1e6
        total = memory + fma + dot + simd + rest
        found = counts(total=total, load_store=memory, simd=fma + dot + simd, fma_fp32=fma, dot=dot)
        models.append(Measured(found, milliseconds * (1.0 + noise * rng.standard_normal())))
    return models


def test_known_costs_are_found_again() -> None:
    model = fit(made_up(12))
    assert model.way == "classes"
    found = {name: cost * 1e6 for name, cost in model.costs.items() if cost}
    expected = {"simd" if name == "other simd" else name: c for name, c in NANOSECONDS.items()}
    assert found == pytest.approx(expected, rel=1e-6)
    assert model.error is not None and model.error < 1e-6
    new = made_up(13)[-1]
    assert model.milliseconds(new.counts) == pytest.approx(new.milliseconds, rel=1e-6)


def test_the_stated_error_is_that_of_models_it_has_not_seen() -> None:
    measured = made_up(60, noise=0.1)
    model = fit(measured[:20])
    errors = [abs(model.milliseconds(m.counts) / m.milliseconds - 1) for m in measured[20:]]
    assert model.error == pytest.approx(np.mean(errors), rel=0.5)
    assert model.error > 0.05


def test_costs_are_never_negative() -> None:
    rng = np.random.default_rng(1)
    noise = [Measured(m.counts, float(rng.uniform(1, 100))) for m in made_up(8)]
    assert min(fit(noise).costs.values()) >= 0


def test_few_models_get_one_cost_for_every_instruction_and_no_stated_error() -> None:
    one = Measured(counts(total=2_000_000, load_store=500_000), 4.0)
    model = fit([one])
    assert model.way == "total" and model.error is None
    assert model.milliseconds(counts(total=1_000_000)) == pytest.approx(2.0)


def test_a_class_that_no_record_executes_is_not_estimated() -> None:
    model = fit([Measured(counts(total=100, simd=50, fma_fp32=40), 1.0)])
    with pytest.raises(DataError, match="class dot, .* record one"):
        model.milliseconds(counts(total=100, simd=50, dot=40))


def test_nothing_recorded_is_told() -> None:
    with pytest.raises(DataError, match="--on native --on PROFILE --record FILE"):
        fit([])


def test_the_words_name_the_kernel_and_what_follows() -> None:
    dear = kernels_in_words(counts(total=100, simd=60, widening=40), 1.2)
    assert dear.startswith("0 dot-product instructions") and "will not pay" in dear
    cheap = kernels_in_words(counts(total=100, simd=60, dot=20), 0.4)
    assert "kernels made for it" in cheap and "will not pay" not in cheap
    assert "floating point" in kernels_in_words(counts(total=100, simd=60, fma_fp32=50), 1.0)
    assert "SVE and SME" in kernels_in_words(counts(total=100, sve=60), 0.5)


COUNTED = counts(total=100, load_store=20, simd=50, fma_fp32=40)


def cost(device: str, **figures: object) -> DeviceCost:
    model = replace(ModelCost("m.edgec", "ab12", 5), **figures)
    return DeviceCost(device, "latency_ms" in figures, (model,))


def test_latencies_and_counts_of_one_bundle_meet_in_the_file(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "board.json"
    add_records(file, records_of([cost("native", latency_ms=3.5)]))
    assert read_records(file).measured() == ()
    add_records(file, records_of([cost("cortex-a76", counts=COUNTED)]))
    assert read_records(file).measured() == (Measured(COUNTED, 3.5),)
    add_records(file, records_of([cost("native", latency_ms=4.5)]))
    assert read_records(file).measured() == (Measured(COUNTED, 4.5),)
    assert [p.name for p in tmp_path.iterdir()] == ["board.json"]


def test_a_file_holds_one_device_and_one_profile(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "board.json"
    both = [cost("native", latency_ms=3.5), cost("cortex-a76", counts=COUNTED)]
    add_records(file, records_of(both))
    before = file.read_bytes()
    with pytest.raises(DataError, match="measured on native, these on ssh://other"):
        add_records(file, records_of([cost("ssh://other", latency_ms=1.0)]))
    with pytest.raises(DataError, match="counted on cortex-a76, these on cortex-a72"):
        add_records(file, records_of([cost("cortex-a72", counts=COUNTED)]))
    assert file.read_bytes() == before
    for given in ([], [*both, cost("cortex-a72", counts=COUNTED)], [cost("haswell")]):
        with pytest.raises(DataError, match="one real device .* one profile that counts"):
            records_of(given)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("{}", "damaged"),
        ('{"version": 2}', "version 2, expected 1"),
        (
            '{"version": 1, "device": "d", "counted_on": "", "models": [{"name": "m",'
            ' "sha256": "a", "milliseconds": 0, "instructions": null}]}',
            "a latency of 0 ms",
        ),
        ('{"version": 1, "device": "d", "counted_on": "", "models": [3]}', "damaged"),
    ],
)
def test_a_damaged_file_is_refused_before_anything_runs(
    text: str, reason: str, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "board.json"
    file.write_text(text)
    with pytest.raises(DataError, match=reason):
        read_records(file)
    bundle = tmp_path / "none.edgec"
    done = CliRunner().invoke(main, ["bench", str(bundle), "--on", "native", "--record", str(file)])
    assert done.exit_code == 1 and "board.json" in done.output


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match="cannot be written"):
        add_records(tmp_path / "none" / "board.json", DeviceRecords(models=(Record("m", "a"),)))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return bundles.build("x86-64", tmp_path_factory.mktemp("x86-64"))


def test_the_command_times_bundle_and_reference_on_a_real_device(
    bundle: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "here.json"
    arguments = ["bench", str(bundle), "--on", "native", "--record", str(file)]
    [found] = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert [m["name"] for m in found["models"]] == ["mlp.edgec", "mlp.reference.onnx"]
    assert all(m["latency_ms"] > 0 and m["instructions"] is None for m in found["models"])
    records = read_records(file)
    assert records.device == "native" and len(records.models) == 2
    shown = CliRunner().invoke(main, arguments)
    assert "milliseconds" in shown.stdout and "megabytes" in shown.stdout
    assert len(read_records(file).models) == 2  # measured again, not added again


@pytest.mark.parametrize(
    "option", ["--threads=2", "--seconds=1", "--min-speedup=2", "--max-latency-ms=2"]
)
def test_options_of_this_machine_are_refused_with_on(bundle: pathlib.Path, option: str) -> None:
    done = CliRunner().invoke(main, ["bench", str(bundle), "--on", "native", option])
    assert done.exit_code == 2 and "for this machine" in done.output


@pytest.mark.parametrize("option", ["--record", "--estimate"])
def test_files_of_devices_need_a_device(bundle: pathlib.Path, option: str) -> None:
    done = CliRunner().invoke(main, ["bench", str(bundle), option, "x.json"])
    assert done.exit_code == 2 and "need --on" in done.output


def test_an_estimate_needs_records(bundle: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "board.json"
    add_records(file, records_of([cost("ssh://board", latency_ms=3.5)]))
    with pytest.raises(DataError, match="no recorded model has both"):
        cost_on(bundle, ["native"], estimate=file)
