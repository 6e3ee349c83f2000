"""Static int8: activation ranges from calibration data, integer kernels on the device.

The float model runs once over the calibration data (`edgec.passes.calibration`); from that
run come ranges, the rounding of the weights and the correction of the biases
(`edgec.passes.static_choices`), and Q/DQ pairs go where `edgec.passes.placement` says that
the target's ONNX Runtime executes integers. ONNX Runtime's own optimizer is asked whether
each pair really became an integer kernel.

Left out: mixed precision (the search around a build names layers in ``skip``), cross-layer
equalization (a pass of its own).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import onnx_ir as ir

from edgec.passes import placement
from edgec.passes.calibration import calibrate, samples_of
from edgec.passes.contract import Context, PassError, Result, Stage
from edgec.passes.emission import emit, name_of
from edgec.passes.execution import optimized_graph
from edgec.passes.lower_weights import lower_weights
from edgec.passes.placement import Placement
from edgec.passes.ranges import RangeMethod
from edgec.passes.static_choices import chosen_ranges, decided
from edgec.passes.static_decisions import Decisions, replayed
from edgec.passes.weight_rounding import Rounding
from edgec.passes.weights import BLOCK_OPSET, check_skip, label
from edgec.targets.schema import Int8, Target
from edgec_runtime.errors import suggestion

_LEAST_OPSET = 13  # DequantizeLinear with an axis
_WIDE = ("uint16", "int16")
_EIGHT = 8
_WIDE_OPSET = 21  # QuantizeLinear to 16 bits


@dataclass(frozen=True)
class QuantizeStatic:
    """Quantize weights to 8 or 4 and activations to 8 or 16 bits, ranges measured beforehand.

    Cases: Conv (grouped, depthwise), Gemm and MatMul with a constant weight; a Relu or Clip
    behind them; residual Add, pooling, Concat and reshapes between them. Needs calibration
    data, or the decisions of an earlier run.
    """

    name: ClassVar[str] = "quantize-static"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 8

    # how the range of an activation is chosen; auto: for each the one with the least noise
    ranges: Literal["auto", "minmax", "percentile", "mse", "entropy"] = "auto"
    percentile: float = 99.999  # share of values inside the range, for ranges = "percentile"
    ops: tuple[str, ...] = ()  # operators to take of those that pay; none: all of them
    skip: tuple[str, ...] = ()  # names of nodes that stay float
    weight_bits: Literal[4, 8] = 8  # 4: half the file, at a cost that recover wins back
    rounding: Rounding = "gptq"  # how weights become integers
    clip_weights: bool = False  # let scales cut the largest weights: for heavy tails at few bits
    bias_correction: bool = True  # give each channel the mean that it has in float

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.weight_bits not in (4, _EIGHT):
            raise PassError(f"quantize-static: weight_bits is {self.weight_bits}, expected 4 or 8")
        for field, given, known in (
            ("ranges", self.ranges, ("auto", *get_args(RangeMethod))),
            ("rounding", self.rounding, get_args(Rounding)),
        ):
            if given not in known:
                near = suggestion(given, known)
                raise PassError(f"quantize-static: no {field} method '{given}'{near}")
        if not 50.0 < self.percentile <= 100.0:
            raise PassError(
                f"quantize-static: percentile is {self.percentile}, expected above 50 up to 100"
            )

    def run(self, model: ir.Model, context: Context) -> Result:
        """Insert Q/DQ pairs around everything that pays on the target in integers."""
        int8 = replace(
            context.target.int8,
            weight_bits=self.weight_bits,
            static_ops=self._taken(context.target),
        )
        self._check(model, int8)
        plan = placement.place(model.graph, int8, self.skip)
        if not plan.units:
            return Result(model, 0, skipped=plan.skipped)
        if context.lock:
            found = replayed(
                context.lock,
                plan,
                bias_correction=self.bias_correction,
                rounded=self.rounding != "nearest",
            )
        else:
            found = self._measured(model, plan, int8, context)
        touched = tuple(name_of(unit.output) for unit in plan.units)
        weights = emit(model, plan, found, int8)
        # 16 bits are for devices that do not compute with ONNX Runtime's own kernels
        unfused: tuple[str, ...] = ()
        if int8.activation not in _WIDE:
            # integer kernels take weights of 4 bits as `lower` hands them over
            whole = int8.weight_bits == _EIGHT
            given = model if whole else lower_weights(model.clone(), context).model
            unfused = _unfused(given, plan, weights)
        return Result(
            model,
            len(plan.units),
            plan.skipped,
            touched,
            context.lock or found.to_json(),  # a lock may know more nodes than this run
            unfused,
            found.sensitivity,
        )

    def _taken(self, target: Target) -> tuple[str, ...]:
        known = target.int8.static_ops
        for op in self.ops:
            if op not in known:
                raise PassError(
                    f"quantize-static: ops has '{op}', which {target.name} does not compute in "
                    f"static int8; it has {', '.join(known) or 'none'}{suggestion(op, known)}"
                )
        return self.ops or known

    def _check(self, model: ir.Model, int8: Int8) -> None:
        opset = model.opset_imports.get("", 0)
        if int8.activation in _WIDE and opset < _WIDE_OPSET:
            raise PassError(
                f"the model has opset {opset}; {int8.activation} activations need {_WIDE_OPSET}: "
                "run cleanup first, with a target of that opset"
            )
        if int8.weight_bits != _EIGHT and opset < BLOCK_OPSET:
            raise PassError(
                f"the model has opset {opset}; weights of {int8.weight_bits} bits need "
                f"{BLOCK_OPSET}: run cleanup first, with a target of that opset"
            )
        if opset < _LEAST_OPSET:
            raise PassError(
                f"the model has opset {opset}; quantization per channel needs {_LEAST_OPSET}: "
                "convert the model, or run cleanup first"
            )
        check_skip(self.name, self.skip, model.graph)

    def _measured(
        self, model: ir.Model, plan: Placement, int8: Int8, context: Context
    ) -> Decisions:
        calibration = calibrate(
            model,
            plan,
            samples_of(context.calibration),
            seed=context.seed,
            progress=context.progress,
        )
        spans = chosen_ranges(
            plan,
            calibration,
            int8,
            method=self._range_method(int8),
            share=self.percentile,
        )
        return decided(
            plan,
            calibration,
            spans,
            int8,
            method=self.rounding,
            clip=self.clip_weights,
            bias_correction=self.bias_correction,
        )

    def _range_method(self, int8: Int8) -> RangeMethod | None:
        """How all ranges are chosen; None: each by its noise."""
        if self.ranges != "auto":
            return self.ranges
        # 16 bits have steps to spare: nothing is gained by cutting the largest values off
        return "minmax" if int8.activation in _WIDE else None


def _unfused(model: ir.Model, plan: Placement, weights: Mapping[ir.Node, str]) -> tuple[str, ...]:
    """One sentence for each quantized node that ONNX Runtime does not run in integers.

    weights: name of each computing node's dequantized weight; an integer kernel reads the
    integers behind it.
    """
    optimized = optimized_graph(model).graph
    producers = {value.name: node for node in optimized for value in node.outputs}
    read = {value.name for node in optimized for value in node.inputs if value is not None}
    findings = []
    for unit in plan.units:
        quantizers = [n for n, _ in unit.output.uses() if n.op_type == "QuantizeLinear"]
        producer = producers.get(quantizers[0].outputs[0].name) if quantizers else None
        apart = producer is not None and producer.op_type == "QuantizeLinear"
        if apart or weights.get(unit.node) in read:
            findings.append(
                f"node '{label(unit.node)}' ({unit.node.op_type}) is quantized, but ONNX Runtime "
                "runs it in float: name it in skip"
            )
    return tuple(findings)
