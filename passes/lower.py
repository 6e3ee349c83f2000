"""Turns the standard graph into the operators of the target's ONNX Runtime; the last pass.

The only place where com.microsoft operators come from. Each kind of pattern has its own
module, tried in the order below; a pattern whose kernel the target lacks stays standard.
The last of them may lower the model's opset to one that has a faster kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from edgec.passes.contract import Context, Result, Stage
from edgec.passes.join_products import join_products
from edgec.passes.lower_attention import lower_attention
from edgec.passes.lower_decoder import lower_decoder
from edgec.passes.lower_logits import lower_logits
from edgec.passes.lower_norm import lower_norm
from edgec.passes.lower_pool import lower_pool
from edgec.passes.lower_weights import lower_weights

_STEPS = (
    lower_weights,
    lower_norm,
    lower_decoder,
    lower_attention,
    join_products,
    lower_logits,
    lower_pool,
)


@dataclass(frozen=True)
class Lower:
    """Standard ONNX to what the target's runtime executes fastest."""

    name: ClassVar[str] = "lower"
    stage: ClassVar[Stage] = Stage.LOWER
    lossless: ClassVar[bool] = True
    version: ClassVar[int] = 5

    def run(self, model: ir.Model, context: Context) -> Result:
        """Lower; ``changed`` counts the nodes that were replaced or read another form.

        ``touched`` names the outputs of kernels that round activations to int8.
        """
        total = Result(model, 0)
        for step in _STEPS:
            result = step(total.model, context)
            total = Result(
                result.model,
                total.changed + result.changed,
                total.skipped + result.skipped,
                total.touched + result.touched,
                {**total.decisions, **result.decisions},
                total.findings + result.findings,
            )
        return total
