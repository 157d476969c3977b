"""What a Transformer's residual connections lead around: attention and feed-forward (Vaswani et al. 2017, section 3).

Shapes: batch B, token T, width D (features of a token), heads H.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from gradflow.errors import UsageError


class MultiHeadAttention(nn.Module):
    """Scaled dot-product self-attention in `heads` subspaces (Vaswani et al. 2017, section 3.2).

    head_h = softmax(Q_h K_hᵀ / √(D/H)) V_h; the heads side by side pass one more linear map.

    Args:
        width: D, a multiple of `heads`.
        heads: H.
        dropout: Probability that an attention weight is dropped while training.
    """

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        check_positive(width=width, heads=heads)
        check_probability("dropout", dropout)
        if width % heads:
            raise UsageError(f"expected a width that is a multiple of the heads, got width {width} and heads {heads}")
        self.heads = heads
        self.dropout = dropout
        # Glorot's range for the three maps packed into one (3D, D) matrix, as in torch.nn.MultiheadAttention
        self.query, self.key, self.value = (_linear(width, width, gain=0.5**0.5) for _ in range(3))
        self.output = _linear(width, width)

    def forward(self, x: Tensor, padding: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """Attend within each sequence.

        Args:
            x: (B, T, D).
            padding: (B, T), bool, True where a token is padding and must not be attended to.
            causal: Whether a token sees itself and earlier tokens only.

        Returns:
            (B, T, D). A token that may attend to nothing (padding that sees only padding) gets the output's bias.
        """
        mask = _attention_mask(padding, x.shape[1], causal=causal)
        q, k, v = (self._split(linear(x)) for linear in (self.query, self.key, self.value))
        dropout = self.dropout if self.training else 0.0
        heads = scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal and mask is None)
        return self.output(heads.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)  # (B, H, T, D/H)


class FeedForward(nn.Module):
    """W₂ max(0, W₁ x + b₁) + b₂, the same at every position (Vaswani et al. 2017, section 3.3).

    Args:
        width: D, features in and out.
        hidden: Features between.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        check_positive(width=width, hidden=hidden)
        self.expand, self.activation, self.contract = _linear(width, hidden), nn.ReLU(), _linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.contract(self.activation(self.expand(x)))  # type: ignore[no-any-return]


def _attention_mask(padding: Tensor | None, tokens: int, *, causal: bool) -> Tensor | None:
    """Return (B, 1, 1 or T, T), True where attention may look; None where `is_causal` or nothing says it already."""
    if padding is None:
        return None
    if padding.dtype != torch.bool or padding.dim() != 2 or padding.shape[1] != tokens:
        raise UsageError(
            f"expected a padding mask of shape (batch, {tokens}), bool, True at padding, "
            f"got shape {tuple(padding.shape)} of {padding.dtype}"
        )
    visible = ~padding[:, None, None, :]
    return visible & torch.ones(tokens, tokens, dtype=torch.bool, device=padding.device).tril() if causal else visible


def _linear(features: int, out: int, *, gain: float = 1.0) -> nn.Linear:
    """Return a map with weights of U(−r, r), r = gain · √(6/(features + out)) (Glorot & Bengio 2010), and zero bias."""
    linear = nn.Linear(features, out)
    nn.init.xavier_uniform_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


def check_positive(**sizes: int) -> None:
    """Raise unless every size is an integer of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise UsageError(f"expected {name} to be a positive integer, got {size!r}")


def check_probability(name: str, got: float) -> None:
    """Raise unless `got` is a probability that leaves something."""
    if not 0.0 <= got < 1.0:
        raise UsageError(f"expected {name} to be a probability from 0 to below 1, got {got!r}")


def check_choice(name: str, got: str, choices: tuple[str, ...]) -> None:
    """Raise unless `got` is one of the choices."""
    if got not in choices:
        raise UsageError(f"expected {name} to be one of {', '.join(map(repr, choices))}, got {got!r}")
