"""Wins back what quantization lost: trains the graph towards the reference, without labels.

The reference runs in ONNX Runtime and gives the answers (teacher); the quantized graph runs
as its differentiable twin (student). Loss: KL divergence of the output probabilities or
normalised squared error, plus normalised squared error at values that both graphs share
(FitNets, Romero et al. 2015, arXiv:1412.6550). What is trained is what ships: integer
weights move under their fixed scales and are rounded back (quantization-aware training,
Jacob et al. 2018, arXiv:1712.05877). The best state on held-out samples wins, the
untrained one included, so the pass cannot make the held-out figure worse. The training
itself is in `edgec.passes.lesson`.

Left out: labels, relation distillation, learned scales, blocks on disk, several processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import onnx_ir as ir

from edgec.passes.contract import Context, PassError, Result, Skip, Stage
from edgec.passes.curriculum import Order
from edgec.passes.differences import apply_differences, differences
from edgec.passes.lesson import NOTHING, THREADS, Lesson
from edgec.passes.losses import LAYERS
from edgec.passes.weights import label
from edgec_runtime.errors import suggestion


@dataclass(frozen=True)
class Recover:
    """Train weights and biases so that the outputs come back to the reference's.

    Needs calibration data; labels are not used. A step sees ``batch`` samples.
    """

    name: ClassVar[str] = "recover"
    stage: ClassVar[Stage] = Stage.TRAIN
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 2

    steps: int = 80  # optimizer steps
    batch: int = 8  # samples a step
    splice: bool = True  # train on pieces of two samples put together, too
    order: Order = "random"  # of the samples; easy-first: where the teacher is sure come first
    rate: float = 0.0  # of weights: quantization steps a step, at the peak; 0: they stay
    bias_rate: float = 3e-5  # of biases: share of their root mean square a step, at the peak
    features: int = 12  # inner values that are matched besides the outputs; 0: none
    feature_weight: float = 1.0  # of the inner values' loss against the outputs'

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.order not in get_args(Order):
            near = suggestion(self.order, get_args(Order))
            raise PassError(f"recover: no order '{self.order}'{near}")
        for name in ("steps", "batch"):
            if not getattr(self, name) > 0:
                raise PassError(f"recover: {name} is {getattr(self, name)}, expected above 0")
        if not (self.rate >= 0 and self.bias_rate >= 0 and self.rate + self.bias_rate > 0):
            raise PassError("recover: rate and bias_rate must be 0 or more, and not both be 0")
        if self.features < 0 or self.feature_weight < 0:
            raise PassError("recover: features and feature_weight are negative, expected 0 or more")

    def run(self, model: ir.Model, context: Context) -> Result:
        """Train, keep the best held-out state, write it into the same graph."""
        if context.lock:
            changed = apply_differences(model, context.lock.get("changes", {}))
            return Result(model, changed, touched=(), decisions=dict(context.lock))
        if context.calibration is None or not len(context.calibration):
            raise PassError(
                "recover needs calibration data to learn from: give some dozen typical inputs"
            )
        import torch

        from edgec.passes.torch_graph import to_torch

        untrained = model.clone()
        try:
            twin = to_torch(model)
        except PassError as error:
            node = next(n for n in model.graph if f"'{n.name}'" in str(error))
            skip = Skip(label(node), str(error))
            finding = f"nothing was trained: {error}"
            return Result(model, 0, (skip,), findings=(finding,), decisions={"changes": {}})
        threads = torch.get_num_threads()
        torch.set_num_threads(THREADS)
        try:
            found = Lesson(twin, model, context, self).train()
        finally:
            torch.set_num_threads(threads)
        if not found.improved:
            finding = (
                "there is nothing to win back: the outputs are the reference's"
                if found.before <= NOTHING
                else "training did not lower the held-out distance; the model is unchanged"
            )
            return Result(model, 0, findings=(finding,), decisions={"changes": {}})
        changed = twin.write_back(model)
        changes = differences(untrained, model)
        finding = (
            f"held-out distance {found.before:.4g} before, {found.after:.4g} after "
            f"{found.step} of {self.steps} steps"
        )
        return Result(
            model,
            changed,
            touched=tuple(
                str(v.name) for n in model.graph if n.op_type in LAYERS for v in n.outputs
            ),
            decisions={"changes": changes},
            findings=(finding,),
        )
