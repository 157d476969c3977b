"""Closed forms: what a quantity should be at initialisation, so that rules and plots compare with theory.

Notation: f is Var(branch)/Var(skip), the square of `branch_ratio`; b is the squared gain of the gradient through the
branch alone; L counts joins (or layers), l runs from 1 (0 is the input). "Variance" means the second moment E x²
unless a docstring says centred: for ReLU branches they differ, and 1/l is exact for the second moment alone.

Pure functions of numbers; depths may be numpy arrays where the signature says so. No torch, no run, no I/O.

Sources by year: He 2015 (arXiv:1502.01852), Veit 2016 (1605.06431), Poole 2016 (1606.05340), Schoenholz 2017
(1611.01232), Balduzzi 2017 (1702.08591), Yang 2019 (1902.08129), Zhang 2019 Fixup (1901.09321), De & Smith 2020
(2002.10444), Bachlechner 2020 ReZero (2003.04887), Xiong 2020 (2002.04745), Brock 2021 (2101.08692), Dong 2021
(2103.03404), Touvron 2021 CaiT (2103.17239), Wang 2022 DeepNorm (2203.00555), Noci 2022 (2206.03126), Kosson 2023
(2305.17212), Sun 2025 LayerNorm scaling (2502.05795).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

RELU_CENTRED = 1.0 - 1.0 / math.pi
"""Centred variance of a He-initialised ReLU branch's channels over inputs (c = 0.682); their squared mean is 1/π."""
RELU_ZEROS = 0.5
"""Fraction of exact zeros after a ReLU whose input is symmetric about 0: natural, no sign of dead units."""
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(101)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def harmonic(n: int) -> float:
    """H_n = 1 + 1/2 + ... + 1/n; 0 for n = 0."""
    return float(np.sum(1.0 / np.arange(1, n + 1)))


# --- pre-norm: x_l = x_{l-1} + f_l(norm(x_{l-1})) ---------------------------------------------------------------------


def prenorm_variance(depth: Array | float, *, branch: float = 1.0, start: float = 1.0) -> Array | float:
    """Stream variance after `depth` joins: v_0 + l·v_f, linear, since each branch sees a normalised input (derived).

    `branch` is the variance of one branch's output, `start` that of the stream's input.
    """
    return start + depth * branch


def prenorm_branch_share(depth: Array | float, *, branch: float = 1.0, start: float = 1.0) -> Array | float:
    """Share f of join l: v_f/(v_0 + (l-1)·v_f); 1/l for unit branches (De & Smith 2020)."""
    return branch / (start + (depth - 1) * branch)


def step_cosine(f: Array | float) -> Array | float:
    """Cosine between a stream before and after a join with an uncorrelated branch: 1/√(1+f); √(l/(l+1)) at f = 1/l."""
    return 1.0 / np.sqrt(1.0 + np.asarray(f, dtype=np.float64))


def prenorm_gradient_growth(depth: Array | float, joins: float, *, branch: float = 1.0, start: float = 1.0) -> Array:
    """Squared gradient norm at x_l over that at x_L: v_L/v_l, (L+1)/(l+1) for unit branches (derived).

    The branch's Jacobian carries the norm's 1/√v_{l-1}, so b = v_f/v_{l-1} = f and each join multiplies by 1 + f:
    pre-norm gradients grow towards the input, and a ratio up to √(L+1) is no pathology.
    """
    last = start + joins * branch
    return np.asarray(last / (start + np.asarray(depth, dtype=np.float64) * branch))


def prenorm_weight_gradient_ratio(joins: int) -> float:
    """Weight-gradient norm of branch 1 over that of branch L: √((L+1)/2), as ∂L/∂W_l has the size of g at x_l."""
    return math.sqrt((joins + 1) / 2)


def layernorm_scaling_variance(joins: int) -> float:
    """Var x_L where the norm's output is multiplied by 1/√l: 1 + H_L instead of 1 + L (Sun 2025)."""
    return 1.0 + harmonic(joins)


# --- post-norm and sublayers in general -------------------------------------------------------------------------------


def sublayer_gain_squared(b: Array | float, f: Array | float) -> Array | float:
    """Squared gradient gain of a whole post-norm sublayer norm(x + branch(x)): (1+b)/(1+f); 1 where b = f.

    With the branch detached (b = 0) and f = 1 it is 1/2: the loss of 1/√2 a sublayer that is often quoted is that of
    the skip alone. Without a norm after the join the denominator is 1: use `join_gain_squared`.
    """
    return (1.0 + b) / (1.0 + f)


def join_gain_squared(b: Array | float) -> Array | float:
    """Squared gradient gain of a join x + branch(x) without a norm after it: 1 + b."""
    return 1.0 + b


def attention_gain_squared(correlation: Array | float) -> Array | float:
    """Squared gain of a post-norm sublayer of nearly uniform attention over tokens of mean cosine ρ: 1/(1+ρ).

    Averaging n tokens keeps the ρ that they share (f = ρ), while the gradient that comes back is spread over all
    tokens and its independent part averages out (b ≈ 0).
    """
    return 1.0 / (1.0 + np.asarray(correlation, dtype=np.float64))


def deepnorm_constants(layers: int) -> tuple[float, float]:
    """(α, β) of DeepNorm for an encoder-only or decoder-only stack of N layers: (2N)^¼ and (8N)^-¼ (Wang 2022)."""
    return (2.0 * layers) ** 0.25, (8.0 * layers) ** -0.25


# --- residual stacks without norms ------------------------------------------------------------------------------------


def unnormalised_growth(joins: int, *, alpha: float = 1.0) -> float:
    """Var x_L/Var x_0 of x + α·branch(x) with branches of unit gain, and the gradient's likewise: (1+α²)^L.

    2^L at α = 1 (De & Smith 2020); at α² = 1/L it stays below e (Noci 2022).
    """
    return float((1.0 + alpha**2) ** joins)


def scaled_residual_factor(joins: int) -> float:
    """The factor 1/√L that keeps an un-normalised residual stack of L joins at Var x_L/Var x_0 < e (Noci 2022)."""
    return 1.0 / math.sqrt(joins)


def fixup_scale(joins: int, weights_per_branch: int) -> float:
    """Fixup's factor on the weights inside a branch of m ≥ 2 weight layers: L^(-1/(2m-2)) (Zhang 2019)."""
    return float(joins ** (-1.0 / (2 * weights_per_branch - 2)))


def gated_branch(gate: float, *, unscaled: float = 1.0) -> tuple[float, float]:
    """(f, factor on the branch weights' gradient energy) of x + g·branch(x): both g² times the ungated value.

    At g = 0 (ReZero, zero-initialised last layer) both are exactly 0 at step 0 and the gate alone learns
    (Bachlechner 2020; LayerScale: Touvron 2021). `unscaled` is f at g = 1.
    """
    return gate**2 * unscaled, gate**2


def resnet_v2_variance(blocks: Array | float) -> Array | float:
    """Centred per-channel variance after l BN-ReLU-conv blocks on unit-variance input: 1 + c·l (Brock 2021)."""
    return 1.0 + RELU_CENTRED * blocks


def resnet_v2_transition() -> float:
    """Centred variance after a transition block whose shortcut convolves the shared pre-activation: resets to 2c."""
    return 2.0 * RELU_CENTRED


# --- plain stacks -----------------------------------------------------------------------------------------------------


def gaussian_mean(function: Callable[[Array], Array], variance: float) -> float:
    """E φ(z) for z ~ N(0, variance), by Gauss-Hermite quadrature of 101 nodes (1e-3 for kinked functions)."""
    return float(np.sum(_WEIGHTS * function(math.sqrt(variance) * _NODES)))


def relu_layer_gain(weight_variance: float, fan_in: int) -> float:
    """Second-moment gain of a layer W·relu(z): fan_in·Var(w)/2 (He 2015).

    He initialisation 1; variance 1/fan_in 1/2; `nn.Linear`'s default (variance 1/(3·fan_in)) 1/6.
    """
    return fan_in * weight_variance / 2.0


def relu_gradient_gain(weight_variance: float, fan_out: int) -> float:
    """Squared gradient gain of the same layer going back: fan_out·Var(w)/2 (He 2015)."""
    return fan_out * weight_variance / 2.0


KNOWN_GAINS: tuple[tuple[str, float], ...] = (
    ("He initialisation", 1.0),
    ("weights of variance 1/fan_in (LeCun, or Glorot in a square layer)", 1.0 / 2.0),
    ("the default of nn.Linear and nn.Conv2d (variance 1/(3·fan_in))", 1.0 / 6.0),
)
"""Second-moment gain per ReLU layer that each usual initialisation leaves behind."""


def initialisation_of(gain: float, *, tolerance: float = 0.2) -> str | None:
    """Name of the initialisation whose ReLU gain per layer is within `tolerance` (relative) of `gain`, or None."""
    name, expected = min(KNOWN_GAINS, key=lambda known: abs(math.log(max(gain, 1e-300) / known[1])))
    return name if abs(gain / expected - 1.0) <= tolerance else None


def relu_correlation(c: Array | float) -> Array | float:
    """Cosine of two inputs after one He-initialised ReLU layer: (√(1-c²) + c·(π - arccos c))/π.

    The arc-cosine kernel (Cho & Saul 2009; Poole 2016). Its only fixed point is 1: inputs align in any plain ReLU
    stack, 1 - c falling as 9π²/(2·l²).
    """
    c = np.clip(c, -1.0, 1.0)
    return np.asarray((np.sqrt(1.0 - c**2) + c * (np.pi - np.arccos(c))) / np.pi)


def relu_stack_correlation(c: float, layers: int) -> float:
    """`relu_correlation` applied `layers` times."""
    for _ in range(layers):
        c = float(relu_correlation(c))
    return c


def tanh_fixed_point(weight_variance: float, bias_variance: float = 0.0) -> tuple[float, float]:
    """(q*, χ₁) of a wide tanh stack: pre-activation variance where it settles, squared gradient gain a layer there.

    q = σ_w²·E tanh²(√q z) + σ_b², χ₁ = σ_w²·E tanh'²(√q z), σ_w² = fan_in·Var(w). χ₁ < 1: gradients vanish; χ₁ > 1:
    they explode; σ_w² = 1, σ_b² = 0 is critical (Schoenholz 2017).
    """
    q = weight_variance + bias_variance
    for _ in range(2000):
        q = weight_variance * gaussian_mean(lambda z: np.tanh(z) ** 2, q) + bias_variance
    return q, weight_variance * gaussian_mean(lambda z: (1.0 - np.tanh(z) ** 2) ** 2, q)


SIGMOID_GRADIENT_BOUND = 1.0 / 16.0
"""Largest squared slope of the logistic function: a sigmoid layer of unit weights keeps at most 1/16 of the energy."""


def batchnorm_relu_gradient_gain() -> float:
    """Squared gradient gain a layer of a plain stack of batch norm and ReLU: π/(π-1) = 1.467 (Yang 2019).

    For wide layers and large batches. Batch norm makes a deep plain stack's gradient explode at initialisation whatever
    its weights; residual connections cure it.
    """
    return math.pi / (math.pi - 1.0)


def shattered_gradient_correlation(layers: int, *, residual: bool) -> float:
    """Order of the correlation between gradients at nearby inputs: 2^-L plain, (3/4)^L residual (Balduzzi 2017)."""
    return float(0.75**layers if residual else 0.5**layers)


# --- paths, attention, tokens -----------------------------------------------------------------------------------------


def path_length_distribution(shares: Sequence[float] | Array) -> Array:
    """Share of the gradient's energy that crossed k = 0..L branches, from each join's b: a product of 1 + b·z.

    Each join multiplies the energy by 1 (skip) + b (branch): the length is Poisson-binomial with b/(1+b) (Veit 2016).
    """
    result = np.ones(1)
    for b in shares:
        result = np.convolve(result, np.array([1.0, b]) / (1.0 + b))
    return result


def mean_path_length(shares: Sequence[float] | Array) -> float:
    """Σ b/(1+b): L/2 un-normalised (b = 1), H_{L+1} - 1 pre-norm (b = 1/l)."""
    b = np.asarray(shares, dtype=np.float64)
    return float(np.sum(b / (1.0 + b)))


ATTENTION_SLOPE = {"none": 3.0, "identity": 1.0}
"""Slope of log token spread, out against in, of one attention layer without and with a skip: cubic against linear.

Spread is the norm of what tokens differ by over what they share; without skips it dies doubly exponentially (Dong
2021).
"""


def softmax_entropy(keys: float, logit_variance: float) -> float:
    """Entropy in nat of a softmax over n logits N(0, σ²): ln n - σ²/2, 0 from σ² = 2·ln n on (random-energy model)."""
    return max(0.0, math.log(keys) - logit_variance / 2.0)


def shared_cosine(shared: float, private: float) -> float:
    """Mean cosine of tokens made of a common part and private parts of these variances: s/(s+p)."""
    return shared / (shared + private) if shared + private > 0 else 0.0


def max_over_median(n: int) -> float:
    """Largest over median |x| of n normal values: about √(2·ln n)/0.6745."""
    return math.sqrt(2.0 * math.log(max(n, 2))) / 0.6745


def gpt2_stream_variance(block: Array | float, *, layers: int, width: int, std: float = 0.02) -> Array | float:
    """Stream variance at position 0 after block l of Hugging Face's GPT-2: 2s² + l·(a+m).

    a = (d·s²)²/(2L): attention passes its one value vector through two maps of variance s²; m is the MLP's, with
    E[gelu(N(0, d·s²))²]·4d·s²/(2L) (its output weights are scaled by 1/√(2L)). From its initialisation code.
    """
    squared = width * std**2
    attention = squared**2 / (2 * layers)
    mlp = gaussian_mean(lambda z: gelu(z) ** 2, squared) * 4 * width * std**2 / (2 * layers)
    return 2 * std**2 + block * (attention + mlp)


def gelu(z: Array) -> Array:
    """GELU in its tanh form, which GPT-2 uses."""
    return np.asarray(0.5 * z * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3))))


# --- optimizers and losses --------------------------------------------------------------------------------------------


def adam_update_bound(learning_rate: float, beta1: float = 0.9, beta2: float = 0.999) -> float:
    """Largest step of one weight under Adam: lr·(1-β₁)/√(1-β₂) if that exceeds lr, else lr (Kingma & Ba 2015, §2.1)."""
    return learning_rate * max(1.0, (1.0 - beta1) / math.sqrt(1.0 - beta2))


def adamw_equilibrium_ratio(learning_rate: float, weight_decay: float, beta1: float = 0.9) -> float:
    """Update over weight at which AdamW's matrices settle: √(2·lr·λ·(1-β₁)/(1+β₁)) (Kosson 2023).

    The norm grows by updates orthogonal to the weights and shrinks by decay until both balance.
    """
    return math.sqrt(2.0 * learning_rate * weight_decay * (1.0 - beta1) / (1.0 + beta1))


def uniform_loss(classes: int) -> float:
    """Cross-entropy of a model that knows nothing: ln(classes) nat."""
    return math.log(classes)
