"""The reference Transformer: what gradflow's demo trains, and what its figures are checked against.

Blocks of multi-head attention and a ReLU feed-forward, each sublayer followed by the residual addition and then layer
normalisation, `output = norm(input + sublayer(input))` (Vaswani et al. 2017, section 3.1,
https://arxiv.org/abs/1706.03762). Three switches change that rule and nothing else, so that models can be compared:
`residual` and `span` leave every parameter and its name as it is, `norm` all but those of the norms.

Shapes: batch B, token T, width D (features of a token), heads H, vocabulary V.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, get_args

import torch
from torch import Tensor, nn

from gradflow.errors import UsageError
from gradflow.sublayers import FeedForward, MultiHeadAttention, check_choice, check_positive, check_probability

if TYPE_CHECKING:
    from collections.abc import Callable

Norm = Literal["post", "pre", "none"]
Positions = Literal["sinusoidal", "learned"]


class EncoderOptions(TypedDict, total=False):
    """The keyword arguments of `Encoder`, which documents them."""

    hidden: int | None
    attention_dropout: float | None
    norm: Norm
    residual: bool
    span: int


class Block(nn.Module):
    """Attention and feed-forward, each followed (or preceded) by its norm, with a skip where `joins` says so.

    Args:
        width: D.
        heads: H.
        hidden: Features between the two linear maps of the feed-forward.
        dropout: Probability on the output of a sublayer, before the addition (Vaswani et al. 2017, section 5.4).
        attention_dropout: Probability on attention weights.
        norm: `"post"`: norm(skip + f(x)). `"pre"`: skip + f(norm(x)) (Xiong et al. 2020,
            https://arxiv.org/abs/2002.04745). `"none"`: skip + f(x).
        joins: Whether the skip is added after the attention, and after the feed-forward.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        dropout: float,
        attention_dropout: float,
        norm: Norm = "post",
        joins: tuple[bool, bool] = (True, True),
    ) -> None:
        super().__init__()
        check_choice("norm", norm, get_args(Norm))
        check_probability("dropout", dropout)
        self.norm, self.joins = norm, joins
        self.attention = MultiHeadAttention(width, heads, dropout=attention_dropout)
        self.attention_norm = nn.Identity() if norm == "none" else nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden)
        self.feed_forward_norm = nn.Identity() if norm == "none" else nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, skip: Tensor | None = None, *, padding: Tensor | None = None, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Apply both sublayers.

        Args:
            x: (B, T, D).
            skip: (B, T, D), the fork of the skip that is open where the block begins; `x` itself by default.
            padding: (B, T), bool, True where a token is padding.
            causal: Whether a token sees itself and earlier tokens only.

        Returns:
            The block's output (B, T, D), and the fork of the skip that is open where the block ends.
        """
        skip = x if skip is None else skip
        x, skip = self._sublayer(
            lambda h: self.attention(h, padding, causal=causal), self.attention_norm, x, skip, joins=self.joins[0]
        )
        return self._sublayer(self.feed_forward, self.feed_forward_norm, x, skip, joins=self.joins[1])

    def _sublayer(
        self, function: Callable[[Tensor], Tensor], norm: nn.Module, x: Tensor, skip: Tensor, *, joins: bool
    ) -> tuple[Tensor, Tensor]:
        f = self.dropout(function(norm(x) if self.norm == "pre" else x))
        y = skip + f if joins else f
        if self.norm == "post":
            y = norm(y)
        return y, y if joins else skip


class Encoder(nn.Module):
    """A stack of blocks over vectors; with pre-norm, what leaves the last block is normalised once more.

    Args:
        width: D.
        depth: Blocks; each has two sublayers.
        heads: H.
        hidden: Features between the two linear maps of the feed-forward; `4 * width` by default, as published.
        dropout: Probability on the output of a sublayer.
        attention_dropout: Probability on attention weights; `dropout` by default.
        norm: Where layer normalisation stands: `"post"`, `"pre"` or `"none"`.
        residual: False leaves every addition out; parameters and norms stay.
        span: Sublayers that one skip leaps over: 1 as published, 2 one addition a block, k one addition after each
            k-th sublayer of the stack, to the stream as it was k sublayers before. Divides `2 * depth`.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        hidden: int | None = None,
        dropout: float = 0.1,
        attention_dropout: float | None = None,
        norm: Norm = "post",
        residual: bool = True,
        span: int = 1,
    ) -> None:
        super().__init__()
        check_positive(depth=depth, span=span)
        if 2 * depth % span:
            raise UsageError(f"expected a span that divides the {2 * depth} sublayers of {depth} blocks, got {span}")
        joins = [residual and sublayer % span == 0 for sublayer in range(1, 2 * depth + 1)]
        hidden = 4 * width if hidden is None else hidden
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden, dropout=dropout, attention_dropout=attention_dropout, norm=norm, joins=pair)
            for pair in zip(joins[::2], joins[1::2], strict=True)
        )
        self.final_norm = nn.LayerNorm(width) if norm == "pre" else None

    def forward(self, x: Tensor, padding: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """Map (B, T, D) to (B, T, D); `padding` (B, T) is True at tokens that no other token may see."""
        skip = x
        for block in self.blocks:
            x, skip = block(x, skip, padding=padding, causal=causal)
        return x if self.final_norm is None else self.final_norm(x)


class Embedding(nn.Module):
    """√D · token embedding + position, then dropout (Vaswani et al. 2017, sections 3.4, 3.5 and 5.4).

    Args:
        vocabulary: V.
        width: D.
        max_tokens: Length of the longest sequence.
        positions: `"sinusoidal"` as published, or `"learned"`.
        dropout: Probability on the sum.
    """

    def __init__(
        self, vocabulary: int, width: int, *, max_tokens: int, positions: Positions = "sinusoidal", dropout: float = 0.1
    ) -> None:
        super().__init__()
        check_positive(vocabulary=vocabulary, width=width, max_tokens=max_tokens)
        check_choice("positions", positions, get_args(Positions))
        check_probability("dropout", dropout)
        self.max_tokens = max_tokens
        self.token = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.token.weight, std=width**-0.5)  # so that √D · embedding has unit variance
        if positions == "learned":
            self.position = nn.Parameter(torch.empty(max_tokens, width))
            nn.init.normal_(self.position, std=width**-0.5)
        else:
            self.register_buffer("position", sinusoids(max_tokens, width), persistent=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token numbers (B, T), an integer tensor, to vectors (B, T, D)."""
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.shape[1] > self.max_tokens:
            raise UsageError(
                f"expected token numbers (batch, token), an integer tensor of at most {self.max_tokens} tokens, "
                f"got shape {tuple(tokens.shape)} of {tokens.dtype}: cut the sequence or raise max_tokens"
            )
        scaled = self.token(tokens) * math.sqrt(self.token.embedding_dim)
        return self.dropout(scaled + self.position[: tokens.shape[1]])  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    """Predicts the next token: embedding, causal `Encoder`, and the embedding matrix again as the output layer.

    Args:
        vocabulary: V.
        width: D.
        depth: Blocks.
        heads: H.
        max_tokens: Longest sequence.
        positions: `"sinusoidal"` or `"learned"`.
        tie_weights: Whether the output layer is the embedding matrix (Press & Wolf 2017,
            https://arxiv.org/abs/1608.05859).
        dropout: Probability on embeddings and on the outputs of sublayers.
        options: The other keyword arguments of `Encoder`: `hidden`, `attention_dropout`, `norm`, `residual`, `span`.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        depth: int,
        heads: int,
        *,
        max_tokens: int = 512,
        positions: Positions = "sinusoidal",
        tie_weights: bool = True,
        dropout: float = 0.1,
        **options: Unpack[EncoderOptions],
    ) -> None:
        super().__init__()
        self.embedding = Embedding(vocabulary, width, max_tokens=max_tokens, positions=positions, dropout=dropout)
        self.encoder = Encoder(width, depth, heads, dropout=dropout, **options)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.xavier_uniform_(self.head.weight)
        if tie_weights:
            self.head.weight = self.embedding.token.weight

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Map token numbers (B, T) to the logits (B, T, V) of the token that follows each."""
        return self.head(self.encoder(self.embedding(tokens), padding, causal=True))  # type: ignore[no-any-return]


def sinusoids(tokens: int, width: int) -> Tensor:
    """Return the position table (T, D) of Vaswani et al. 2017, section 3.5.

    PE[t, 2i] = sin(t / 10000^(2i/D)), PE[t, 2i+1] = cos(t / 10000^(2i/D)).
    """
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = torch.arange(tokens).unsqueeze(1) * frequency  # (T, ⌈D/2⌉)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :width]
