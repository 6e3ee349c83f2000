"""The passes: one a file, listed here in the order of their stages."""

from edgec.passes.adapter_slots import AdapterSlots
from edgec.passes.cleanup import Cleanup
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
from edgec.passes.equalize import Equalize
from edgec.passes.fuse import Fuse
from edgec.passes.lower import Lower
from edgec.passes.prune_blocks import PruneBlocks
from edgec.passes.prune_magnitude import PruneMagnitude
from edgec.passes.prune_structured import PruneStructured
from edgec.passes.quantize_cache import QuantizeCache
from edgec.passes.quantize_dynamic import QuantizeDynamic
from edgec.passes.quantize_static import QuantizeStatic
from edgec.passes.quantize_weights import QuantizeWeights
from edgec.passes.reconstruct import Reconstruct
from edgec.passes.recover import Recover
from edgec.passes.smooth_activations import SmoothActivations
from edgec.passes.swap_activations import SwapActivations

PASSES: tuple[type[Pass], ...] = (
    Cleanup,
    Fuse,
    PruneMagnitude,
    PruneBlocks,
    PruneStructured,
    SwapActivations,
    Recover,
    Equalize,
    SmoothActivations,
    QuantizeStatic,
    Reconstruct,
    QuantizeDynamic,
    QuantizeWeights,
    ConvertFloat16,
    Lower,
    QuantizeCache,
    AdapterSlots,
)

__all__ = [
    "PASSES",
    "AdapterSlots",
    "Cleanup",
    "Context",
    "ConvertFloat16",
    "Feeds",
    "Equalize",
    "Fuse",
    "Lower",
    "Pass",
    "PassError",
    "Progress",
    "PruneBlocks",
    "PruneMagnitude",
    "PruneStructured",
    "QuantizeCache",
    "QuantizeDynamic",
    "QuantizeStatic",
    "QuantizeWeights",
    "Reconstruct",
    "Recover",
    "Result",
    "Samples",
    "Skip",
    "SmoothActivations",
    "Stage",
    "SwapActivations",
]
