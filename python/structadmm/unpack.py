"""nn.MultiheadAttention taken apart into linear layers and scaled_dot_product_attention, so that its channels can go.

The projections keep the names of the module that they come from: `attn.in_proj_weight` is then `attn.in_proj.weight`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """What a nn.MultiheadAttention computes; for a tracer to go into."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def __init__(self, m: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.head_dim, self.batch_first, self.dropout = m.num_heads, m.head_dim, m.batch_first, m.dropout
        weight, bias = m.in_proj_weight, m.in_proj_bias
        self.embed_dim = m.embed_dim
        if weight is not None:
            self.in_proj = _linear(weight, bias)
        else:
            biases = (None,) * 3 if bias is None else bias.detach().chunk(3)
            weights = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
            self.q_proj, self.k_proj, self.v_proj = (_linear(*pair) for pair in zip(weights, biases, strict=True))
        self.out_proj = _linear(m.out_proj.weight, m.out_proj.bias)
        self.train(m.training)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not hasattr(self, "in_proj"):
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if query is not key or key is not value:
            raise NotImplementedError("packed projections of different tensors")
        q, k, v = self.in_proj(query).chunk(3, -1)
        return q, k, v

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            raise NotImplementedError("masks")
        q, k, v = self._projected(query, key, value)
        if not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        weights: Any = None
        if need_weights:
            weights = torch.softmax(q @ k.transpose(-2, -1) * self.head_dim**-0.5, -1)
            y = F.dropout(weights, self.dropout, self.training) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        elif self.dropout:
            weights = torch.softmax(q @ k.transpose(-2, -1) * self.head_dim**-0.5, -1)
            y, weights = F.dropout(weights, self.dropout, self.training) @ v, None
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).flatten(2)
        return self.out_proj(y if self.batch_first else y.transpose(0, 1)), weights


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.clone())
    return layer


def unpack(root: nn.Module) -> list[str]:
    """Replace the attention modules of `root` that can be taken apart, in place; their names."""
    done: dict[nn.Module, nn.Module] = {}
    names = []
    for name, module in list(root.named_modules()):
        inside = any(isinstance(p, (nn.Transformer, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
                     for p in _parents(root, name))  # fmt: skip
        plain = type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn
        if not name or not plain or inside:
            continue
        assert isinstance(module, nn.MultiheadAttention)
        parent, _, last = name.rpartition(".")
        done.setdefault(module, Attention(module))
        setattr(root.get_submodule(parent), last, done[module])
        names.append(name)
    return names


def _parents(root: nn.Module, name: str) -> list[nn.Module]:
    parts = name.split(".")
    return [root.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
