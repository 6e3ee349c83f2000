"""The student as one module: the twin of a graph and what it is judged by.

What several processes train has to be one module whose forward pass gives the loss. Products
may run in bfloat16 (autocast; Micikevicius et al. 2018, arXiv:1710.03740, with a type that
needs no loss scaling); losses and judgements are in float32. Activations may be computed
again in the backward pass instead of kept (Chen et al. 2016, arXiv:1604.06174, section 3).
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from edgec.passes.stacks import Stack, Values
from edgec.passes.torch_graph import TorchGraph
from edgec.passes.training_settings import TrainingSettings

Measure = Literal["loss", "distance"]


class Objective(Protocol):
    """What is lessened, and what held-out samples are judged by."""

    @property
    def student_features(self) -> tuple[str, ...]:
        """Inner values of the student that ``loss`` needs besides the outputs."""
        ...

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is learned beside the student and not shipped."""
        ...

    def loss(self, values: Values, answers: Values, labels: Values) -> Tensor:
        """The mean over the samples of a stack; the student's values, the teacher's answers."""
        ...

    def distance(self, values: Values, answers: Values, labels: Values) -> Tensor:
        """The same for held-out samples, from the outputs alone."""
        ...


class Student(torch.nn.Module):
    """The twin, the learned projections of its objective, and how to run them."""

    def __init__(self, twin: TorchGraph, objective: Objective, settings: TrainingSettings) -> None:
        """The twin is trained in place."""
        super().__init__()
        self.twin = twin
        self.projections = torch.nn.ParameterList(objective.parameters())
        self._objective, self._settings = objective, settings

    def forward(self, stack: Stack, measure: Measure, wider: float = 0.0) -> Tensor:
        """How far the answers to a stack are from the teacher's, one number.

        measure: "loss" is what a step lessens; "distance" is what held-out samples are judged
        by, in full precision and with weights of their own width. wider: of ``TorchGraph``.
        """
        if measure == "distance":
            return self._objective.distance(self.twin(stack.feeds), stack.answers, stack.labels)
        short = self._settings.precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16, enabled=short):
            values = self.twin(
                stack.feeds,
                keep=self._objective.student_features,
                segments=self._settings.segments,
                wider=wider,
            )
        exact = {n: v.float() if v.is_floating_point() else v for n, v in values.items()}
        return self._objective.loss(exact, stack.answers, stack.labels)
