"""The passes: one a file, listed here in the order of their stages."""

from edgec.passes.contract import (
    Context,
    Feeds,
    Pass,
    PassError,
    Progress,
    Result,
    Samples,
    Skip,
    Stage,
)
from edgec.passes.convert_float16 import ConvertFloat16
from edgec.passes.lower import Lower
from edgec.passes.prune_magnitude import PruneMagnitude
from edgec.passes.quantize_dynamic import QuantizeDynamic
from edgec.passes.quantize_weights import QuantizeWeights

PASSES: tuple[type[Pass], ...] = (
    PruneMagnitude,
    QuantizeDynamic,
    QuantizeWeights,
    ConvertFloat16,
    Lower,
)

__all__ = [
    "PASSES",
    "Context",
    "ConvertFloat16",
    "Feeds",
    "Lower",
    "Pass",
    "PassError",
    "Progress",
    "PruneMagnitude",
    "QuantizeDynamic",
    "QuantizeWeights",
    "Result",
    "Samples",
    "Skip",
    "Stage",
]
