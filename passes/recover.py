"""Wins back what compression lost: trains the graph towards a teacher, with or without labels.

The teacher, the reference or another model, runs in ONNX Runtime and gives the answers; the
graph as it is so far runs as its differentiable twin (student). What is lessened: the
weighted losses of `edgec.passes.losses`. What is trained is what ships: integer
weights move under their scales and are rounded back (quantization-aware training,
Jacob et al. 2018, arXiv:1712.05877), the scales too where asked for (LSQ, Esser et al. 2020,
arXiv:1902.08153). Weights of few bits may begin on a finer grid and lose it bit by bit, as
fast as the sparsity of Zhu and Gupta 2017 (arXiv:1710.01878, section 3) climbs: ``bits_from``.
The best state on held-out samples wins, the untrained one included, so the pass cannot make the
held-out figure worse. The training itself is in `edgec.passes.lesson`.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, get_args

import onnx_ir as ir

from edgec.passes.contract import Context, PassError, Result, Skip, Stage
from edgec.passes.curriculum import Order
from edgec.passes.differences import apply_differences, differences
from edgec.passes.lesson import train
from edgec.passes.losses import LAYERS
from edgec.passes.progressive import still_ahead
from edgec.passes.sparsity import keep_zeros
from edgec.passes.teacher import load_teacher
from edgec.passes.training_loop import NOTHING
from edgec.passes.training_settings import TrainingSettings
from edgec.passes.weights import label
from edgec_runtime.errors import suggestion

if TYPE_CHECKING:
    from edgec.passes.torch_graph import TorchGraph

_WIDEST = 16  # bits of a grid: float32 holds its points to the last one
_RATES = ("rate", "bias_rate", "scale_rate")
_WEIGHTS = (
    "response_weight",
    "feature_weight",
    "distance_weight",
    "angle_weight",
    "label_weight",
)


@dataclass(frozen=True)
class Recover(TrainingSettings):
    """Train weights and biases so that the outputs come back to the reference's.

    Needs calibration data; class labels that come with it are used. A step sees ``batch``
    samples.
    """

    name: ClassVar[str] = "recover"
    stage: ClassVar[Stage] = Stage.TRAIN
    lossless: ClassVar[bool] = False
    version: ClassVar[int] = 5

    sharded: bool = False  # of several processes, each keeps a share of weights and state
    splice: bool = True  # train on pieces of two samples put together, too
    order: Order = "random"  # of the samples; easy-first: where the teacher is sure come first
    rate: float = 0.0  # of weights: quantization steps a step, at the peak; 0: they stay
    bias_rate: float = 3e-5  # of biases: share of their root mean square a step, at the peak
    scale_rate: float = 0.0  # of scales, at the peak: share of themselves a step; 0: they stay
    bits_from: int = 0  # integer weights of fewer bits begin on a grid so wide; 0: on their own
    teacher: str = ""  # .onnx file that gives the answers; by default the reference does
    response_weight: float = 1.0  # of the outputs' loss
    temperature: float = 1.0  # that softens class probabilities; above 1: small ones count more
    features: int = 12  # inner values that are matched besides the outputs; 0: none
    feature_weight: float = 1.0  # of the inner values' loss
    distance_weight: float = 0.0  # of the loss of distances between samples
    angle_weight: float = 0.0  # of the loss of angles between samples
    label_weight: float = 0.1  # of the cross-entropy with class labels, where the data has them

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.order not in get_args(Order):
            near = suggestion(self.order, get_args(Order))
            raise PassError(f"recover: no order '{self.order}'{near}")
        self.check()
        if not any(getattr(self, name) for name in _RATES):
            raise PassError(f"recover: nothing to train: {', '.join(_RATES)} are all 0")
        for name in ("features", *_RATES, *_WEIGHTS):
            if not getattr(self, name) >= 0:
                raise PassError(f"recover: {name} is {getattr(self, name)}, expected 0 or more")
        if not any(getattr(self, name) for name in _WEIGHTS):
            raise PassError(f"recover: nothing to learn from: {', '.join(_WEIGHTS)} are all 0")
        if not self.temperature > 0:
            raise PassError(f"recover: temperature is {self.temperature}, expected above 0")
        self._check_width()
        self._check_used()

    def run(self, model: ir.Model, context: Context) -> Result:
        """Train, keep the best held-out state, write it into the same graph."""
        if context.lock:
            changed = apply_differences(model, context.lock.get("changes", {}))
            return Result(model, changed, touched=(), decisions=dict(context.lock))
        if context.calibration is None or not len(context.calibration):
            raise PassError(
                "recover needs calibration data to learn from: give some dozen typical inputs"
            )
        if self.teacher:
            context = replace(context, reference=load_teacher(pathlib.Path(self.teacher), model))
        untrained = model.clone()
        try:
            twin = self.twin(model)
        except PassError as error:
            node = next((n for n in model.graph if f"'{n.name}'" in str(error)), None)
            skips = () if node is None else (Skip(label(node), str(error)),)
            finding = f"nothing was trained: {error}"
            return Result(model, 0, skips, findings=(finding,), decisions={"changes": {}})
        if self.bits_from and not twin.widened():
            raise PassError(
                f"recover: bits_from is {self.bits_from}, but this graph has no integer weights of "
                "fewer bits, so nothing would begin on a finer grid; leave it out, or put recover "
                "behind a quantization to fewer bits (in a recipe with several recover, give "
                "bits_from in a .toml file, to that one alone)"
            )
        kept = keep_zeros(twin, model, context.unquantized)
        if kept and self.rate and context.workers is not None and context.workers.size > 1:
            raise PassError(
                f"recover: {kept} weights are pruned, and several processes do not keep them at "
                "zero: train in one, or set recover.rate=0, which leaves all weights as they are"
            )
        found = train(twin, model, context, self)
        if not found.steps and found.before > NOTHING:  # it says why
            return Result(model, 0, findings=found.findings, decisions={"changes": {}})
        if not found.improved:
            finding = (
                "there is nothing to win back: the outputs are the reference's"
                if found.before <= NOTHING
                else "training did not lower the held-out distance; the model is unchanged"
            )
            findings = (finding, *found.findings)
            return Result(model, 0, findings=findings, decisions={"changes": {}})
        changed = twin.write_back(model)
        changes = differences(untrained, model)
        finding = (
            f"held-out distance {found.before:.4g} before, {found.after:.4g} after "
            f"{found.step} of {found.steps} steps"
        )
        zeros = (f"{kept} pruned weights stayed zero",) if kept and self.rate else ()
        return Result(
            model,
            changed,
            touched=tuple(
                str(v.name) for n in model.graph if n.op_type in LAYERS for v in n.outputs
            ),
            decisions={"changes": changes},
            findings=(finding, *zeros, *found.findings),
        )

    def twin(self, model: ir.Model) -> TorchGraph:
        """What is trained of a graph. Raises PassError where torch cannot run it."""
        from edgec.passes.torch_graph import to_torch

        return to_torch(
            model,
            learn_scales=self.scale_rate > 0,
            bits_from=self.bits_from,
            # rounded again on a scale that moved, weights that stay would undo what it learns
            keep_integers=self.rate == 0,
        )

    def wider(self, step: int) -> float:
        """Share of the bits above their own that weights are rounded to at a step.

        It falls over the first half of the steps, rounded down, and is 0 in the rest. step: 0
        for the first.
        """
        return still_ahead(step / (self.steps // 2)) if self.bits_from else 0.0

    def _check_used(self) -> None:
        """Raise PassError for a setting that another one leaves without effect."""
        unused = {  # setting -> is it set, and what stands against it
            "temperature": (self.temperature != Recover.temperature, "response_weight"),
            "features": (self.features not in (0, Recover.features), "feature_weight"),
            "feature_weight": (self.feature_weight not in (0, Recover.feature_weight), "features"),
        }
        for name, (is_set, other) in unused.items():
            if is_set and not getattr(self, other):
                raise PassError(
                    f"recover: {name} is {getattr(self, name)}, but {other} is 0, so it would have "
                    f"no effect; leave recover.{name} out, or set recover.{other}"
                )

    def _check_width(self) -> None:
        """Raise PassError for a ``bits_from`` that is out of range or without effect."""
        if not self.bits_from:
            return
        if not 0 < self.bits_from <= _WIDEST:
            raise PassError(
                f"recover: bits_from is {self.bits_from}, expected up to {_WIDEST} bits, or 0 for "
                "weights that are rounded to their own width from the start"
            )
        if not self.rate:
            raise PassError(
                f"recover: bits_from is {self.bits_from}, but rate is 0, so no weight moves; set "
                "recover.rate, or leave bits_from out"
            )
        if self.steps < 2:
            raise PassError(
                "recover: bits_from takes the first half of the steps, and there is but one; "
                "raise steps, or leave bits_from out"
            )
