"""Every closed form against an independent computation: a small random model in float64, autograd, or brute force."""

import math

import numpy as np
import pytest
import torch

from gradflow import theory

D, ROWS = 512, 128


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(3)
    torch.set_num_threads(1)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def norm(x):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=0.0)


def energy(x):
    return float((x.detach() ** 2).mean())


def stack(layers, join, *, width=D, gain=1.0):
    """Run x = join(x, W, l) `layers` times; return points and the gradients of a random linear loss at them."""
    weights = [(randn(width, width) * math.sqrt(gain / width)).requires_grad_() for _ in range(layers)]
    points = [randn(ROWS, width).requires_grad_()]
    points[0].retain_grad()
    for l, w in enumerate(weights, 1):
        points.append(join(points[-1], w, l))
        points[-1].retain_grad()
    (points[-1] * randn(ROWS, width)).sum().backward()
    return [energy(p) for p in points], [energy(p.grad) for p in points], [w.grad for w in weights], points


@pytest.fixture(scope="module")
def prenorm():
    torch.manual_seed(5)
    return stack(24, lambda x, w, l: x + norm(x) @ w)


def test_prenorm_variance_share_and_cosine_follow_the_linear_law(prenorm):
    variance, _, _, points = prenorm
    for l in range(1, 25):
        assert variance[l] == pytest.approx(theory.prenorm_variance(l), rel=0.06)
        f = energy(points[l] - points[l - 1]) / variance[l - 1]
        assert f == pytest.approx(theory.prenorm_branch_share(l), rel=0.1)
        cosine = torch.cosine_similarity(points[l], points[l - 1], dim=-1).mean().item()
        assert cosine == pytest.approx(theory.step_cosine(1 / l), rel=0.01)


def test_prenorm_gradients_grow_towards_the_input_as_derived(prenorm):
    _, gradient, weights, _ = prenorm
    expected = theory.prenorm_gradient_growth(np.arange(25), 24)
    np.testing.assert_allclose(np.array(gradient) / gradient[-1], expected, rtol=0.1)
    ratio = (weights[0].norm() / weights[-1].norm()).item()
    assert ratio == pytest.approx(theory.prenorm_weight_gradient_ratio(24), rel=0.06)


def test_prenorm_laws_hold_for_small_embeddings_and_branches():
    variance, gradient, _, points = stack(8, lambda x, w, l: (x * 0.1 if l == 1 else x) + 0.5 * norm(x) @ w)
    start = 0.01 * variance[0]
    for l in (1, 3, 8):
        assert variance[l] == pytest.approx(theory.prenorm_variance(l, branch=0.25, start=start), rel=0.08)
    growth = theory.prenorm_gradient_growth(np.arange(1, 9), 8, branch=0.25, start=start)
    np.testing.assert_allclose(np.array(gradient[1:]) / gradient[-1], growth, rtol=0.12)


def test_layernorm_scaling_grows_with_the_harmonic_number():
    variance, _, _, _ = stack(32, lambda x, w, l: x + norm(x) @ w / math.sqrt(l))
    assert variance[-1] == pytest.approx(theory.layernorm_scaling_variance(32), rel=0.06)


def test_postnorm_sublayer_keeps_the_gradient_and_the_skip_alone_halves_it():
    _, whole, _, _ = stack(24, lambda x, w, l: norm(x + x @ w))
    assert (whole[0] / whole[-1]) ** (1 / 24) == pytest.approx(theory.sublayer_gain_squared(1.0, 1.0), rel=0.02)
    _, skip, _, _ = stack(24, lambda x, w, l: norm(x + x.detach() @ w))
    assert (skip[0] / skip[-1]) ** (1 / 24) == pytest.approx(theory.sublayer_gain_squared(0.0, 1.0), rel=0.02)


def test_join_without_norm_multiplies_the_gradient_by_one_plus_b():
    _, gradient, _, _ = stack(6, lambda x, w, l: x + x @ w, gain=0.5)
    assert (gradient[0] / gradient[-1]) ** (1 / 6) == pytest.approx(theory.join_gain_squared(0.5), rel=0.03)


@pytest.mark.parametrize("rho", [0.2, 0.6, 0.95])
def test_postnorm_uniform_attention_over_aligned_tokens_loses_one_over_one_plus_rho(rho):
    x = norm(math.sqrt(rho) * randn(8, 1, D) + math.sqrt(1 - rho) * randn(8, 64, D)).requires_grad_()
    out = norm(x + x.mean(1, keepdim=True) @ (randn(D, D) / math.sqrt(D)))
    (out * randn(*out.shape)).sum().backward()
    assert energy(x.grad) == pytest.approx(theory.attention_gain_squared(rho), rel=0.05)


@pytest.mark.parametrize("alpha", [1.0, math.sqrt(0.1)])
def test_unnormalised_residual_stack_grows_geometrically_in_signal_and_gradient(alpha):
    join = lambda x, w, l: x + alpha * torch.relu(x @ w) @ (randn(D, D) * math.sqrt(2 / D))
    variance, gradient, _, _ = stack(10, join)
    expected = theory.unnormalised_growth(10, alpha=alpha)
    for ratio in (variance[-1] / variance[0], gradient[0] / gradient[-1]):
        assert ratio ** (1 / 10) == pytest.approx(expected ** (1 / 10), rel=0.04)


def test_scaled_residuals_stay_below_e_at_any_depth():
    for joins in (2, 10, 1000):
        assert theory.unnormalised_growth(joins, alpha=theory.scaled_residual_factor(joins)) < math.e


def test_fixup_keeps_the_function_update_of_a_gradient_step_independent_of_depth():
    # L joins change the output by L·lr·(scale^(m-1))² for m factors a branch: Fixup makes that constant.
    for joins in (4, 64):
        for m in (2, 3):
            assert joins * theory.fixup_scale(joins, m) ** (2 * (m - 1)) == pytest.approx(1.0)


def test_deepnorm_constants_are_those_of_the_papers_table():
    alpha, beta = theory.deepnorm_constants(18)
    assert alpha == pytest.approx(36**0.25)
    assert beta == pytest.approx(144**-0.25)
    assert theory.deepnorm_constants(200)[0] == pytest.approx(4.472, abs=1e-3)


@pytest.mark.parametrize("gate", [0.0, 1e-2, 0.5])
def test_gated_branch_scales_share_and_weight_gradient_by_the_squared_gate(gate):
    x, w, r = randn(ROWS, D), (randn(D, D) / math.sqrt(D)).requires_grad_(), randn(ROWS, D)
    reference = torch.autograd.grad(((x + x @ w) * r).sum(), w)[0]
    gradient = torch.autograd.grad(((x + gate * (x @ w)) * r).sum(), w)[0]
    f, factor = theory.gated_branch(gate, unscaled=energy(x @ w) / energy(x))
    assert energy(gate * (x @ w)) / energy(x) == pytest.approx(f)
    assert energy(gradient) == pytest.approx(factor * energy(reference))


def test_resnet_v2_variance_follows_c_per_block_and_resets_at_a_transition():
    C = 128
    x = randn(16, C, 8, 8)
    conv = lambda x, k, **kw: torch.nn.functional.conv2d(x, randn(C, C, k, k) * math.sqrt(2 / (C * k * k)), **kw)
    circular = lambda x: torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
    pre = lambda x: torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True))
    centred = lambda x: x.var((0, 2, 3)).mean().item()
    for l in range(1, 6):
        branch = conv(circular(pre(conv(circular(pre(x)), 3))), 3)
        assert centred(branch) == pytest.approx(theory.RELU_CENTRED, rel=0.06)
        assert (branch.mean((0, 2, 3)) ** 2).mean().item() == pytest.approx(1 / math.pi, rel=0.35)
        x = x + branch
        assert centred(x) == pytest.approx(theory.resnet_v2_variance(l), rel=0.08)
    shared = pre(x)
    out = conv(shared, 1, stride=2) + conv(circular(pre(conv(circular(shared), 3, stride=2))), 3)
    assert centred(out) == pytest.approx(theory.resnet_v2_transition(), rel=0.1)


@pytest.mark.parametrize(("variance", "gain"), [(2 / D, 1.0), (1 / D, 1 / 2), (1 / (3 * D), 1 / 6)])
def test_relu_layer_gain_names_the_initialisation(variance, gain):
    signal, gradient, _, points = stack(20, lambda x, w, l: torch.relu(x @ w), gain=D * variance)
    assert theory.relu_layer_gain(variance, D) == pytest.approx(gain)
    assert (signal[-1] / signal[1]) ** (1 / 19) == pytest.approx(gain, rel=0.06)
    assert (gradient[1] / gradient[-1]) ** (1 / 19) == pytest.approx(theory.relu_gradient_gain(variance, D), rel=0.06)
    zeros = float((points[10] == 0).double().mean())
    assert zeros == pytest.approx(theory.RELU_ZEROS, abs=0.08)
    assert theory.initialisation_of(gain * 1.05) == theory.initialisation_of(gain) is not None
    assert theory.initialisation_of(gain * 1.5) is None


def test_default_linear_initialisation_is_the_one_named():
    w = torch.nn.Linear(D, D).weight.double()
    gain = theory.relu_layer_gain(float(w.detach().var()), D)
    assert "default" in theory.initialisation_of(gain)


def test_relu_correlation_matches_wide_layers_and_tends_to_one():
    for c in (-0.5, 0.0, 0.3, 0.9):
        x = randn(200_000)
        y = c * x + math.sqrt(1 - c * c) * randn(200_000)
        a, b = torch.relu(x), torch.relu(y)
        measured = float((a * b).mean() / ((a**2).mean() * (b**2).mean()).sqrt())
        assert measured == pytest.approx(float(theory.relu_correlation(c)), abs=0.01)
    l = 1000
    assert (1 - theory.relu_stack_correlation(0.0, l)) * l**2 == pytest.approx(9 * math.pi**2 / 2, rel=0.05)


@pytest.mark.parametrize("weight_variance", [0.5, 1.0, 2.5])
def test_tanh_fixed_point_matches_a_wide_stack(weight_variance):
    q, chi = theory.tanh_fixed_point(weight_variance, 0.05)
    bias = math.sqrt(0.05)
    _, gradient, _, points = stack(30, lambda x, w, l: torch.tanh(x) @ w + bias * randn(D), gain=weight_variance)
    assert np.mean([energy(p) for p in points[15:]]) == pytest.approx(q, rel=0.08)
    assert (gradient[15] / gradient[-1]) ** (1 / 15) == pytest.approx(chi, rel=0.05)


def test_tanh_is_critical_at_unit_weights_without_bias():
    assert theory.tanh_fixed_point(1.0)[1] == pytest.approx(1.0, abs=0.01)
    assert theory.tanh_fixed_point(0.5)[1] == pytest.approx(0.5, abs=1e-6)


def test_sigmoid_layer_never_keeps_more_than_a_sixteenth():
    _, gradient, _, _ = stack(5, lambda x, w, l: torch.sigmoid(x @ w))
    ratio = (gradient[0] / gradient[-1]) ** (1 / 5)
    assert 0.5 * theory.SIGMOID_GRADIENT_BOUND < ratio <= theory.SIGMOID_GRADIENT_BOUND * 1.05


def test_plain_batchnorm_relu_stack_explodes_at_the_published_rate():
    bn = lambda x: (x - x.mean(0)) / x.std(0, unbiased=False)
    _, gradient, _, _ = stack(20, lambda x, w, l: torch.relu(bn(x @ w)), gain=2.0)
    assert (gradient[1] / gradient[-1]) ** (1 / 19) == pytest.approx(theory.batchnorm_relu_gradient_gain(), rel=0.06)


def test_path_lengths_are_the_energies_of_a_gradient_split_by_branches_crossed():
    L = 6
    weights = [randn(D, D) / math.sqrt(D) for _ in range(L)]
    parts = [randn(ROWS, D)] + [torch.zeros(ROWS, D, dtype=torch.float64)] * L
    for w in weights:  # one step back through x + x @ w: those that cross the branch move up by one
        crossed = [p @ w.T for p in parts]
        parts = [parts[0]] + [parts[k] + crossed[k - 1] for k in range(1, L + 1)]
    energies = np.array([energy(p) for p in parts])
    expected = theory.path_length_distribution([1.0] * L)
    np.testing.assert_allclose(energies / energies.sum(), expected, rtol=0.25)
    assert expected == pytest.approx([math.comb(L, k) / 2**L for k in range(L + 1)])
    assert theory.mean_path_length([1.0] * L) == pytest.approx(np.dot(expected, np.arange(L + 1))) == L / 2
    assert theory.mean_path_length([1 / l for l in range(1, 25)]) == pytest.approx(theory.harmonic(25) - 1)


@pytest.mark.parametrize("skip", ["none", "identity"])
def test_attention_without_skip_kills_token_spread_cubically(skip):
    d, n = 64, 16
    q, k, v = (randn(d, d) / math.sqrt(d) for _ in range(3))
    spreads = []
    for size in (1e-2, 1e-3):
        x = randn(1, d).expand(n, d) + size * randn(n, d)
        x = x - x.mean(0) + 0 * x.mean(0)  # spread around zero: scores are then bilinear in what differs
        y = torch.softmax((x @ q) @ (x @ k).T / math.sqrt(d), -1) @ (x @ v)
        y = y + x if skip == "identity" else y
        spreads.append([float((z - z.mean(0)).norm()) for z in (x, y)])
    slope = math.log(spreads[0][1] / spreads[1][1]) / math.log(spreads[0][0] / spreads[1][0])
    assert slope == pytest.approx(theory.ATTENTION_SLOPE[skip], abs=0.05)


@pytest.mark.parametrize("variance", [0.25, 1.0, 4.0])
def test_softmax_entropy_of_normal_logits(variance):
    n = 100_000
    logp = torch.log_softmax(randn(8, n) * math.sqrt(variance), -1)
    entropy = float(-(logp.exp() * logp).sum(-1).mean())
    assert entropy == pytest.approx(theory.softmax_entropy(n, variance), rel=0.01)


def test_softmax_entropy_freezes_at_zero():
    assert theory.softmax_entropy(10, 100.0) == 0.0


def test_shared_cosine_and_extremes_of_normal_tokens():
    x = randn(1, D) * 2.0 + randn(64, D)
    unit = x / x.norm(dim=-1, keepdim=True)
    cosine = float(((unit @ unit.T).sum() - 64) / (64 * 63))
    assert cosine == pytest.approx(theory.shared_cosine(4.0, 1.0), abs=0.03)
    assert theory.shared_cosine(0.0, 0.0) == 0.0
    values = randn(100, 10_000).abs()
    measured = float((values.amax(-1) / values.median(-1).values).mean())
    assert measured == pytest.approx(theory.max_over_median(10_000), rel=0.15)


def test_gpt2_from_its_own_initialisation_has_the_predicted_stream():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=6, n_embd=768, n_head=12, vocab_size=128, n_positions=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        states = model(torch.arange(128)[:, None], output_hidden_states=True).hidden_states
    for l in range(6):  # the last entry is after the final norm
        expected = theory.gpt2_stream_variance(l, layers=6, width=768)
        assert energy(states[l].double()) == pytest.approx(expected, rel=0.08)


def test_adam_never_steps_further_than_its_bound():
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=0.1, eps=0.0)
    largest = 0.0
    for gradient in [1e-12] * 2000 + [1.0]:  # the worst case of the paper: a single large gradient after long silence
        before = w.item()
        w.grad = torch.full_like(w, gradient)
        optimizer.step()
        largest = max(largest, abs(w.item() - before))
    bound = theory.adam_update_bound(0.1)
    assert 0.9 * bound < largest <= bound * 1.001
    assert theory.adam_update_bound(0.1, 0.9, 0.99) == pytest.approx(0.1)


def test_adamw_settles_at_the_equilibrium_update_ratio():
    w = torch.nn.Parameter(randn(4000))
    lr, decay = 0.02, 0.5
    optimizer = torch.optim.AdamW([w], lr=lr, weight_decay=decay, betas=(0.9, 0.999))
    ratios = []
    for step in range(1200):
        w.grad = randn(4000)  # scale-invariant weights see a gradient that is orthogonal to them: noise here
        before = w.detach().clone()
        optimizer.step()
        if step > 900:
            ratios.append(float((w.detach() - before * (1 - lr * decay)).norm() / before.norm()))
    assert np.mean(ratios) == pytest.approx(theory.adamw_equilibrium_ratio(lr, decay), rel=0.1)


def test_uniform_loss_is_the_cross_entropy_of_equal_logits():
    logits = torch.zeros(4, 65, dtype=torch.float64)
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(4))
    assert loss.item() == pytest.approx(theory.uniform_loss(65))


def test_shattered_gradients_decay_slower_with_residuals():
    assert theory.shattered_gradient_correlation(10, residual=False) == pytest.approx(2**-10)
    assert theory.shattered_gradient_correlation(10, residual=True) > theory.shattered_gradient_correlation(
        10, residual=False
    )
