"""Results of the literature, reproduced through the public functions: build the model, probe it, read the tables.

Closed forms come from `gradflow.theory`; each tolerance is the largest relative error allowed. The error of a draw of the
weights is about √(2/d), so widths are 512 where the result is about the weights.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradflow
from gradflow import theory

D = 512


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(rows, columns, variance):
    layer = nn.Linear(columns, rows, bias=False)
    nn.init.normal_(layer.weight, std=math.sqrt(variance))
    return layer


class Sublayer(nn.Module):
    """One sublayer: `kind` says where the norm stands; `scale` multiplies the norm's output."""

    def __init__(self, kind, scale=1.0, width=D):
        super().__init__()
        self.kind, self.scale = kind, scale
        self.norm, self.lin = nn.LayerNorm(width), normal(width, width, 1 / width)

    def forward(self, x):
        if self.kind == "pre":
            return x + self.lin(self.scale * self.norm(x))
        branch = self.lin(x.detach() if self.kind == "detached" else x)
        return self.norm(x + branch)


def column(run, table, name):
    return np.array(run.table(table)[name].to_pylist(), dtype=float)


def close(got, expected, tolerance):
    np.testing.assert_allclose(got, np.broadcast_to(expected, np.shape(got)), rtol=tolerance)


def randomly(y):
    """Σ y·r with a random r: the gradient at the output is noise, as at the start of training."""
    return (y * torch.randn(y.shape, dtype=y.dtype)).sum()


def prenorm(joins=24, scale=lambda l: 1.0, tokens=128):
    model = nn.Sequential(*(Sublayer("pre", scale(l)) for l in range(1, joins + 1)))
    x = torch.randn(1, tokens, D).requires_grad_()
    return gradflow.probe(model, x, loss=randomly)


def test_c01_the_variance_of_a_pre_norm_stream_grows_by_one_a_join():
    run, l = prenorm(), np.arange(1, 25)
    close(column(run, "branches", "out_sq") / column(run, "branches", "n"), theory.prenorm_variance(l), 0.06)
    close(column(run, "branches", "branch_ratio") ** 2, theory.prenorm_branch_share(l), 0.08)
    skip, dot, out = (column(run, "branches", name) for name in ("skip_sq", "dot", "out_sq"))
    close((skip + dot) / np.sqrt(skip * out), np.sqrt(l / (l + 1)), 0.01)


def test_c02_pre_norm_gradients_grow_towards_the_input():
    run, l = prenorm(), np.arange(25)
    squares = column(run, "streams", "grad_sq")
    close(squares / squares[-1], theory.prenorm_gradient_growth(l, 24), 0.08)
    weights = [r["grad_sq"] for r in run.table("parameters").to_pylist() if r["parameter"].endswith("lin.weight")]
    close(math.sqrt(weights[0] / weights[-1]), theory.prenorm_weight_gradient_ratio(24), 0.06)


@pytest.mark.parametrize(("kind", "b"), [("post", 1.0), ("detached", 0.0)])
def test_c03_a_post_norm_sublayer_keeps_the_gradient_and_its_skip_alone_halves_it(kind, b):
    model = nn.Sequential(*(Sublayer(kind) for _ in range(24)))
    run = gradflow.probe(model, F.layer_norm(torch.randn(1, 128, D), (D,)).requires_grad_(), loss=randomly)
    squares = column(run, "branches", "grad_fork_sq")
    close((squares[0] / squares[-1]) ** (1 / 23), theory.sublayer_gain_squared(b, 1.0), 0.02)


@pytest.mark.parametrize(("variance", "expected"), [(2 / D, 1.0), (1 / D, 1 / 2), (1 / (3 * D), 1 / 6)])
def test_c06_the_gain_of_a_relu_layer_is_that_of_its_initialisation(variance, expected):
    layers = [m for _ in range(20) for m in (normal(D, D, variance), nn.ReLU())]
    run = gradflow.probe(nn.Sequential(*layers), torch.randn(256, D))
    moments = [r["out_sq"] / r["n"] for r in run.table("layers").to_pylist() if r["kind"] == "ReLU"]
    close((moments[-1] / moments[0]) ** (1 / 19), theory.relu_layer_gain(variance, D), 0.04)
    assert theory.relu_layer_gain(variance, D) == pytest.approx(expected)


def test_c06_the_default_of_linear_layers_loses_five_sixths_a_layer():
    layers = [m for _ in range(20) for m in (nn.Linear(D, D, bias=False), nn.ReLU())]
    run = gradflow.probe(nn.Sequential(*layers), torch.randn(256, D))
    moments = [r["out_sq"] / r["n"] for r in run.table("layers").to_pylist() if r["kind"] == "ReLU"]
    close((moments[-1] / moments[0]) ** (1 / 19), 1 / 6, 0.04)


class Unnormalised(nn.Module):
    def __init__(self, alpha):
        super().__init__()
        self.alpha, self.up, self.down = alpha, normal(D, D, 1 / D), normal(D, D, 2 / D)

    def forward(self, x):
        return x + self.alpha * self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("alpha", [1.0, theory.scaled_residual_factor(10)], ids=["alpha 1", "alpha 1/sqrt L"])
def test_c07_an_unnormalised_stream_grows_exponentially_unless_it_is_scaled(alpha):
    model = nn.Sequential(*(Unnormalised(alpha) for _ in range(10)))
    run = gradflow.probe(model, torch.randn(1, 256, D).requires_grad_(), loss=randomly)
    for name, first, last in (("out_sq", 0, -1), ("grad_sq", -1, 0)):
        values = column(run, "streams", name)
        close(values[last] / values[first], theory.unnormalised_growth(10, alpha=alpha), 0.12)


class Centre(nn.Module):
    """A leaf whose row in `layers` is a channel's deviation from its mean, or that mean."""

    def __init__(self, mean=False):
        super().__init__()
        self.one, self.mean = nn.Parameter(torch.ones(())), mean

    def forward(self, x):
        mean = x.mean((0, 2, 3), keepdim=True)
        return (mean if self.mean else x - mean) * self.one


class ResNetV2(nn.Module):
    def __init__(self, blocks, channels=128):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(blocks + 1))
        self.convs = nn.ModuleList(self.conv(channels, 3) for _ in range(blocks))
        self.branch_deviation = nn.ModuleList(Centre() for _ in range(blocks))
        self.branch_mean = nn.ModuleList(Centre(mean=True) for _ in range(blocks))
        self.deviation = nn.ModuleList(Centre() for _ in range(blocks))
        self.short, self.body, self.after = self.conv(channels, 1, 2), self.conv(channels, 3, 2), Centre()

    @staticmethod
    def conv(channels, size, stride=1):
        conv = nn.Conv2d(channels, channels, size, stride, size // 2, bias=False, padding_mode="circular")
        nn.init.normal_(conv.weight, std=math.sqrt(2 / (channels * size**2)))
        return conv

    def forward(self, x):
        for l, (norm, conv, centre) in enumerate(zip(self.norms, self.convs, self.deviation)):
            branch = conv(F.relu(norm(x)))
            self.branch_deviation[l](branch)
            self.branch_mean[l](branch)
            x = x + branch
            centre(x)
        shared = F.relu(self.norms[-1](x))
        return self.after(self.short(shared) + self.body(shared))


def test_c08_variance_of_a_pre_activation_resnet():
    run = gradflow.probe(ResNetV2(6), torch.randn(16, 128, 8, 8))
    moments = {r["layer"]: r["out_sq"] / r["n"] for r in run.table("layers").to_pylist()}
    close(np.mean([moments[f"branch_deviation.{l}"] for l in range(6)]), theory.RELU_CENTRED, 0.04)
    close(np.mean([moments[f"branch_mean.{l}"] for l in range(6)]), 1 / math.pi, 0.12)
    close([moments[f"deviation.{l}"] for l in range(6)], theory.resnet_v2_variance(np.arange(1, 7)), 0.06)
    close(moments["after"], theory.resnet_v2_transition(), 0.06)


def test_c12_the_gradient_crosses_half_the_branches_unnormalised_and_few_with_pre_norm():
    model = nn.Sequential(*(Unnormalised(1.0) for _ in range(24)))
    plain = gradflow.probe(model, torch.randn(1, 128, D).requires_grad_(), loss=randomly)
    for run, expected in ((plain, 12.0), (prenorm(), theory.harmonic(25) - 1)):
        b = column(run, "branches", "grad_branch_ratio") ** 2
        close(theory.mean_path_length(b), expected, 0.06)


class Attention(nn.Module):
    def __init__(self, skip, width=32):
        super().__init__()
        self.q, self.k, self.v = (normal(width, width, 1 / width) for _ in range(3))
        self.skip = skip

    def forward(self, x):
        y = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return x + y if self.skip else y


@pytest.mark.parametrize(("skip", "slope"), [(False, 3.0), (True, 1.0)])
def test_c15_attention_without_a_skip_brings_tokens_together_cubically(skip, slope):
    assert theory.ATTENTION_SLOPE["identity" if skip else "none"] == slope
    start = nn.Linear(32, 32, bias=False)
    start.weight.data = torch.eye(32)
    model = nn.Sequential(start, Attention(skip)).double()
    shared, own = torch.randn(1, 1, 32).double(), torch.randn(1, 16, 32).double()
    spreads = []
    for size in (0.01, 0.02, 0.04):
        run = gradflow.probe(model, shared + size * own)
        cosines = column(run, "streams", "token_cosine")
        spreads.append(np.log(1 - cosines[[0, -1]]) / 2)
    (x0, y0), (x1, y1) = spreads[0], spreads[-1]
    assert (y1 - y0) / (x1 - x0) == pytest.approx(slope, abs=0.05)


def test_c18_scaling_the_norm_by_one_over_root_l_makes_growth_logarithmic():
    scaled, plain = prenorm(32, lambda l: l**-0.5), prenorm(32)
    for run, expected in ((scaled, theory.layernorm_scaling_variance(32)), (plain, 33.0)):
        close((column(run, "branches", "out_sq") / column(run, "branches", "n"))[-1], expected, 0.06)


class Gated(nn.Module):
    def __init__(self, gate):
        super().__init__()
        torch.manual_seed(1)
        self.gate, self.norm, self.lin = nn.Parameter(torch.full((D,), gate)), nn.LayerNorm(D), normal(D, D, 1 / D)

    def forward(self, x):
        return x + self.gate * self.lin(self.norm(x))


def gated(gate):
    torch.manual_seed(2)
    run = gradflow.probe(nn.Sequential(Gated(gate)), torch.randn(1, 64, D), loss=randomly)
    weight = next(r["grad_sq"] for r in run.table("parameters").to_pylist() if r["parameter"] == "0.lin.weight")
    return column(run, "branches", "branch_ratio")[0] ** 2, weight


def test_c19_a_gate_scales_branch_and_weight_gradient_by_its_square():
    assert gated(0.0) == theory.gated_branch(0.0) == (0.0, 0.0)
    (f, weight), (full, unscaled) = gated(0.1), gated(1.0)
    close([f / full, weight / unscaled], theory.gated_branch(0.1), 0.03)


def test_c19_a_zero_initialised_last_layer_is_exactly_silent():
    layer = Sublayer("pre")
    nn.init.zeros_(layer.lin.weight)
    run = gradflow.probe(nn.Sequential(layer), torch.randn(1, 8, D).requires_grad_(), loss=randomly)
    assert column(run, "branches", "branch_ratio")[0] == 0
    assert column(run, "branches", "grad_branch_ratio")[0] == 0


@pytest.mark.slow
def test_c21_the_stream_of_gpt2_at_position_0():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=12, n_embd=768, n_head=12, vocab_size=1000, n_positions=8, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    run = gradflow.probe(model, torch.arange(256)[:, None], loss=lambda out: out.logits.square().mean())
    after_blocks = (column(run, "branches", "out_sq") / column(run, "branches", "n"))[1::2]
    close(after_blocks, theory.gpt2_stream_variance(np.arange(1, 13), layers=12, width=768), 0.08)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_c22_the_entropy_of_a_softmax_over_normal_logits(sigma):
    class Net(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x[0], x[1], x[1], scale=sigma / math.sqrt(256))

    run = gradflow.probe(Net(), torch.randn(2, 1, 8, D, 256).requires_grad_())
    close(column(run, "attention", "entropy"), theory.softmax_entropy(D, sigma**2), 0.01)


def test_c26_half_of_the_units_of_a_relu_net_are_zero():
    layers = [m for _ in range(8) for m in (normal(D, D, 2 / D), nn.ReLU())]
    run = gradflow.probe(nn.Sequential(*layers), torch.randn(256, D))
    zeros = [r["zero_fraction"] for r in run.table("layers").to_pylist() if r["kind"] == "ReLU"]
    np.testing.assert_allclose(zeros, theory.RELU_ZEROS, atol=0.03)
