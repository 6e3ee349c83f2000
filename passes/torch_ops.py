"""The operators of the twin in one table: ONNX's name -> a function from a ``Call``.

Each family has a file of its own. Left out on purpose: control flow, sequences, strings,
operators whose output's shape depends on data, training operators, and those of other domains
(ONNX Runtime's own): a graph with one of them is refused with the node's name.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgec.passes.torch_attention import ATTENTION
from edgec.passes.torch_call import Operator
from edgec.passes.torch_index import INDEX
from edgec.passes.torch_layers import LAYERS
from edgec.passes.torch_math import MATH
from edgec.passes.torch_norm import NORM
from edgec.passes.torch_pool import POOL
from edgec.passes.torch_quantize import QUANTIZE
from edgec.passes.torch_recurrent import RECURRENT
from edgec.passes.torch_reduce import REDUCE
from edgec.passes.torch_resize import RESIZE
from edgec.passes.torch_shape import SHAPE

FAMILIES: Mapping[str, Mapping[str, Operator]] = {
    "elementwise": MATH,
    "reductions": REDUCE,
    "shapes": SHAPE,
    "indexing": INDEX,
    "convolution and products": LAYERS,
    "pooling": POOL,
    "normalization": NORM,
    "resize": RESIZE,
    "recurrent": RECURRENT,
    "attention": ATTENTION,
    "quantization": QUANTIZE,
}
OPERATORS: Mapping[str, Operator] = {
    name: operator for family in FAMILIES.values() for name, operator in family.items()
}
