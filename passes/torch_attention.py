"""Attention and RotaryEmbedding of the twin, as ONNX defines them from opset 23 on.

Scores and probabilities are written out, since a node may return them and softcap bends them.
A query that may look at no key gives zeros. Rotation: Su et al. 2021 (arXiv:2104.09864);
grouped queries: Ainslie et al. 2023 (arXiv:2305.13245).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from edgec.passes.torch_call import Call, Operator, torch_dtype

_CACHED_RANK = 4  # [batch, heads, time, head size]; of rank 3: [batch, time, heads * head size]


def _attention(c: Call) -> tuple[Tensor, ...]:
    """Output, present key, present value and the scores at the stage that the node asks for."""
    packed = c[0].dim() < _CACHED_RANK
    query = _by_heads(c[0], c.get("q_num_heads"))
    key, value = (_by_heads(c[i], c.get("kv_num_heads")) for i in (1, 2))
    if c[4] is not None:
        key, value = torch.cat([c[4], key], 2), torch.cat([c[5], value], 2)
    root = math.sqrt(float(c.get("scale") or 1 / math.sqrt(query.shape[3])))
    repeats = query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(repeats, 1) if repeats > 1 else t for t in (key, value))
    scores = (query * root) @ (keys * root).transpose(2, 3)
    stages = [scores]
    if c.get("softcap"):
        softcap = float(c.get("softcap"))
        scores = softcap * torch.tanh(scores / softcap)
    stages.append(scores)
    bias = _bias(c, query, key)
    if bias is not None:
        scores = scores + bias
    stages.append(scores)
    precision = c.get("softmax_precision")
    exact = scores if not precision else scores.to(torch_dtype(int(precision)))
    blind = None if bias is None else bias.amax(-1, keepdim=True) == -math.inf
    if blind is not None:  # softmax of nothing but minus infinities, and its gradient, are NaN
        exact = torch.where(blind, torch.zeros_like(exact), exact)
    shares = torch.softmax(exact, -1).to(query.dtype)
    if blind is not None:
        shares = torch.where(blind, torch.zeros_like(shares), shares)
    stages.append(shares)
    y = shares @ values
    if packed:
        y = y.transpose(1, 2).flatten(2)
    return y, key, value, stages[int(c.get("qk_matmul_output_mode", 0))]


def _by_heads(x: Tensor, heads: int | None) -> Tensor:
    """[batch, heads, time, head size]."""
    if x.dim() == _CACHED_RANK:
        return x
    return x.reshape(*x.shape[:2], int(heads or 1), -1).transpose(1, 2)


def _bias(c: Call, query: Tensor, key: Tensor) -> Tensor | None:
    """What is added to the scores, minus infinity where a query may not look."""
    left, right = int(c.get("left_window_size", -1)), int(c.get("right_window_size", -1))
    allowed: Tensor | None = None
    bias = c[3]
    if bias is not None:
        missing = key.shape[2] - bias.shape[-1]
        if missing > 0:
            fill = False if bias.dtype == torch.bool else -math.inf
            bias = F.pad(bias, [0, missing], value=fill)
        if bias.dtype == torch.bool:
            allowed, bias = bias, None
    places = torch.arange(key.shape[2])
    # how far each key lies behind its query: [query, key], or [batch, 1, query, key]
    ahead = places - torch.arange(query.shape[2])[:, None] - _offset(c, query)
    limits = []
    if c.get("is_causal", 0):
        limits.append(ahead <= 0)
    if left >= 0:
        limits.append(-ahead <= left)
    if right >= 0:
        limits.append(ahead <= right)
    if c[6] is not None:
        limits.append(places < c[6].reshape(-1, 1, 1, 1))
    for limit in limits:
        allowed = limit if allowed is None else allowed & limit
    if allowed is None:
        return bias  # type: ignore[no-any-return]
    zero = torch.zeros((), dtype=query.dtype)
    barred = torch.where(allowed, zero, zero - math.inf)
    return barred if bias is None else barred + bias


def _offset(c: Call, query: Tensor) -> Tensor | int:
    """The number of keys in front of the first query."""
    if c[4] is not None:
        return int(c[4].shape[2])
    if c[6] is not None:
        return c[6].reshape(-1, 1, 1, 1) - query.shape[2]  # type: ignore[no-any-return]
    return 0


def _rotary(c: Call) -> Tensor:
    packed = c[0].dim() < _CACHED_RANK
    x = _by_heads(c[0], c.get("num_heads"))
    width = int(c.get("rotary_embedding_dim", 0)) or x.shape[3]
    cosine, sine = (t if c[3] is None else t[c[3].long()] for t in (c[1], c[2]))
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)  # [batch, 1, time, width / 2]
    turned, rest = x[..., :width], x[..., width:]
    if c.get("interleaved", 0):
        real, imaginary = turned[..., 0::2], turned[..., 1::2]
    else:
        real, imaginary = turned.chunk(2, 3)
    parts = (cosine * real - sine * imaginary, sine * real + cosine * imaginary)
    mixed = torch.stack(parts, 4).flatten(3) if c.get("interleaved", 0) else torch.cat(parts, 3)
    y = torch.cat([mixed, rest], 3)
    return y.transpose(1, 2).flatten(2) if packed else y


ATTENTION: dict[str, Operator] = {
    "Attention": _attention,
    "RotaryEmbedding": _rotary,
}
