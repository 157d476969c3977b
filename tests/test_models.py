import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradflow.errors import UsageError
from gradflow.models import Block, Embedding, Encoder, LanguageModel, sinusoids
from gradflow.sublayers import MultiHeadAttention

WIDTH, HEADS, HIDDEN = 16, 4, 24


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def encoder(depth=2, **options):
    return Encoder(WIDTH, depth, HEADS, hidden=HIDDEN, dropout=0.0, **options)


def perturb(module):
    """Away from zero biases and unit gains, so that a forgotten one is seen."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def torch_layer(block, norm):
    """`torch.nn.TransformerEncoderLayer` with the weights of `block`."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, batch_first=True, norm_first=norm == "pre")
    attention, forward = block.attention, block.feed_forward
    packed = {
        kind: torch.cat([getattr(linear, kind) for linear in (attention.query, attention.key, attention.value)])
        for kind in ("weight", "bias")
    }
    pairs = {
        "self_attn.out_proj": attention.output,
        "linear1": forward.expand,
        "linear2": forward.contract,
        "norm1": block.attention_norm,
        "norm2": block.feed_forward_norm,
    }
    state = {f"{name}.{kind}": getattr(module, kind) for name, module in pairs.items() for kind in ("weight", "bias")}
    state |= {f"self_attn.in_proj_{kind}": value for kind, value in packed.items()}
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_block_equals_torch_given_the_same_weights(norm, padded, causal):
    block = perturb(Block(WIDTH, HEADS, HIDDEN, dropout=0.0, attention_dropout=0.0, norm=norm)).double()
    layer = torch_layer(block, norm).double()
    x = torch.randn(3, 7, WIDTH, dtype=torch.float64)
    padding = torch.arange(7) >= torch.tensor([[7], [5], [2]]) if padded else None
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    expected = layer(x, src_mask=mask, src_key_padding_mask=padding)
    got, _ = block(x, padding=padding, causal=causal)
    torch.testing.assert_close(got, expected)
    # the same function backwards too
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), block.attention.query.weight)[0],
        torch.autograd.grad(expected.square().sum(), layer.self_attn.in_proj_weight)[0][:WIDTH],
    )


def test_post_norm_block_is_the_published_rule():
    block = perturb(Block(WIDTH, HEADS, HIDDEN, dropout=0.0, attention_dropout=0.0))
    x = torch.randn(2, 5, WIDTH)
    middle = block.attention_norm(x + block.attention(x))
    expected = block.feed_forward_norm(middle + block.feed_forward(middle))
    torch.testing.assert_close(block(x)[0], expected)


def test_attention_equals_softmax_written_out():
    attention = perturb(MultiHeadAttention(WIDTH, HEADS))
    x, size = torch.randn(2, 5, WIDTH), WIDTH // HEADS
    q, k, v = (linear(x) for linear in (attention.query, attention.key, attention.value))
    heads = []
    for h in range(HEADS):
        part = slice(h * size, (h + 1) * size)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)).softmax(-1)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(attention(x), attention.output(torch.cat(heads, -1)))


@pytest.mark.parametrize("norm", ["post", "pre", "none"])
@pytest.mark.parametrize("span", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("residual", [True, False])
def test_a_skip_leaps_over_span_sublayers_of_the_stack(norm, span, residual):
    stack = perturb(encoder(depth=6, norm=norm, span=span, residual=residual))
    x = torch.randn(2, 5, WIDTH)
    sublayers = [
        pair
        for block in stack.blocks
        for pair in ((block.attention, block.attention_norm), (block.feed_forward, block.feed_forward_norm))
    ]
    stream = [x]  # the stream after each sublayer
    for index, (function, normalise) in enumerate(sublayers, start=1):
        y = function(normalise(stream[-1]) if norm == "pre" else stream[-1])
        if residual and index % span == 0:
            y = y + stream[index - span]
        stream.append(normalise(y) if norm == "post" else y)
    torch.testing.assert_close(stack(x), stack.final_norm(stream[-1]) if norm == "pre" else stream[-1])


def test_switches_leave_parameters_and_their_names_as_they_are():
    names = [
        list(encoder(depth=3, residual=residual, span=span).state_dict())
        for residual, span in [(True, 1), (True, 3), (True, 6), (False, 1)]
    ]
    assert names[0] == names[1] == names[2] == names[3]
    pre = set(encoder(depth=3, norm="pre").state_dict())
    assert pre - set(names[0]) == {"final_norm.weight", "final_norm.bias"}


def test_the_same_seed_gives_the_same_weights_with_and_without_residuals():
    states = []
    for residual in (True, False):
        torch.manual_seed(3)
        states.append(LanguageModel(11, WIDTH, 2, HEADS, residual=residual).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing_at_real_tokens(norm, causal):
    stack = perturb(encoder(norm=norm)).eval()
    x = torch.randn(1, 4, WIDTH)
    padded = torch.cat([x, 100 * torch.randn(1, 3, WIDTH)], dim=1)
    padding = torch.tensor([[False] * 4 + [True] * 3])
    torch.testing.assert_close(stack(padded, padding, causal=causal)[:, :4], stack(x, causal=causal))


def test_tokens_that_see_only_padding_stay_finite():
    attention = perturb(MultiHeadAttention(WIDTH, HEADS))
    x = torch.randn(2, 4, WIDTH, requires_grad=True)
    padding = torch.tensor([[True, True, False, False], [True] * 4])  # padded on the left; padding alone
    out = attention(x, padding, causal=True)
    torch.testing.assert_close(out[0, 0], attention.output.bias)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("norm", ["post", "pre", "none"])
def test_language_model_does_not_look_ahead(norm):
    model = LanguageModel(11, WIDTH, 2, HEADS, norm=norm).eval()
    tokens = torch.randint(11, (2, 9))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_encoder_without_causal_mask_does_look_ahead():
    stack = encoder()
    x = torch.randn(1, 6, WIDTH)
    changed = x.clone()
    changed[:, 5] = -changed[:, 5]
    assert not torch.allclose(stack(x)[:, 0], stack(changed)[:, 0])


def test_encoder_without_positions_permutes_with_its_input():
    stack, order = encoder(), torch.randperm(6)
    x = torch.randn(2, 6, WIDTH)
    torch.testing.assert_close(stack(x)[:, order], stack(x[:, order]))


def test_tied_weights_are_one_parameter_with_both_gradients():
    tied = LanguageModel(11, WIDTH, 1, HEADS, dropout=0.0)
    untied = LanguageModel(11, WIDTH, 1, HEADS, dropout=0.0, tie_weights=False)
    assert tied.head.weight is tied.embedding.token.weight
    assert sum(p.numel() for p in untied.parameters()) == sum(p.numel() for p in tied.parameters()) + 11 * WIDTH
    untied.load_state_dict(tied.state_dict())
    tokens = torch.randint(11, (2, 8))
    for model in (tied, untied):
        F.cross_entropy(model(tokens).transpose(1, 2), tokens).backward()
    torch.testing.assert_close(tied.head.weight.grad, untied.head.weight.grad + untied.embedding.token.weight.grad)


def test_dropout_acts_in_training_only():
    model = LanguageModel(11, WIDTH, 2, HEADS, dropout=0.3)
    tokens = torch.randint(11, (2, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(("dropout", "attention_dropout"), [(0.5, 0.0), (0.0, 0.5)])
def test_each_dropout_acts_by_itself(dropout, attention_dropout):
    stack = Encoder(WIDTH, 1, HEADS, dropout=dropout, attention_dropout=attention_dropout)
    x = torch.randn(2, 8, WIDTH)
    assert not torch.equal(stack(x), stack(x))


def test_dropout_falls_on_the_branch_and_never_on_the_skip():
    block = Block(WIDTH, HEADS, HIDDEN, dropout=0.9999, attention_dropout=0.0, norm="none")
    x = torch.randn(4, 8, WIDTH)
    kept = block(x)[0] == x
    assert kept.float().mean() > 0.99


def test_embedding_is_scaled_by_the_root_of_the_width_and_starts_at_unit_variance():
    embedding = Embedding(500, 64, max_tokens=32, positions="learned", dropout=0.0)
    nn.init.zeros_(embedding.position)
    tokens = torch.randint(500, (8, 32))
    torch.testing.assert_close(embedding(tokens), 8 * embedding.token.weight[tokens])
    assert embedding(tokens).std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("width", [6, 7])
def test_sinusoids_are_the_published_formula(width):
    table = sinusoids(20, width)
    for t in (0, 1, 19):
        for i in range(width):
            angle = t / 10000 ** ((i - i % 2) / width)
            assert table[t, i].item() == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle), abs=1e-5)


def test_learned_positions_are_trained_and_sinusoidal_ones_are_no_parameter():
    learned = LanguageModel(11, WIDTH, 1, HEADS, positions="learned")
    learned(torch.randint(11, (2, 8))).sum().backward()
    assert learned.embedding.position.grad[:8].any()
    assert "embedding.position" in learned.state_dict()
    assert "embedding.position" not in LanguageModel(11, WIDTH, 1, HEADS).state_dict()


def test_linear_maps_start_as_published():
    block = encoder(depth=1).blocks[0]
    for linear in (block.attention.output, block.feed_forward.expand, block.attention.query):
        packed = 3 if linear is block.attention.query else 1
        bound = math.sqrt(6 / (linear.in_features + packed * linear.out_features))
        assert 0.9 * bound < linear.weight.abs().max().item() <= bound
        assert not linear.bias.any()


@pytest.mark.parametrize("norm", ["post", "pre", "none"])
@pytest.mark.parametrize("residual", [True, False])
def test_every_parameter_gets_a_gradient(norm, residual):
    model = LanguageModel(11, WIDTH, 2, HEADS, norm=norm, residual=residual, positions="learned", max_tokens=8)
    tokens = torch.randint(11, (4, 8))
    F.cross_entropy(model(tokens).transpose(1, 2), tokens).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_state_dict_round_trip_gives_the_same_function():
    first, second = (LanguageModel(11, WIDTH, 2, HEADS, span=4).eval() for _ in range(2))
    tokens = torch.randint(11, (2, 8))
    assert not torch.allclose(first(tokens), second(tokens))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(tokens), second(tokens))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Encoder(15, 2, 4), "multiple of the heads, got width 15 and heads 4"),
        (lambda: Encoder(16, 0, 4), "depth to be a positive integer, got 0"),
        (lambda: Encoder(16, 2, 4, span=3), "divides the 4 sublayers of 2 blocks, got 3"),
        (lambda: Encoder(16, 2, 4, norm="rms"), "one of 'post', 'pre', 'none', got 'rms'"),
        (lambda: Encoder(16, 2, 4, dropout=1.0), "probability from 0 to below 1, got 1.0"),
        (lambda: Encoder(16, 2, 4, hidden=0), "hidden to be a positive integer"),
        (lambda: LanguageModel(11, 16, 2, 4, positions="rotary"), "one of 'sinusoidal', 'learned'"),
        (lambda: LanguageModel(11, 16, 2, 4, max_tokens=4)(torch.zeros(1, 5, dtype=torch.long)), "at most 4 tokens"),
        (lambda: LanguageModel(11, 16, 2, 4)(torch.zeros(1, 5)), "integer tensor"),
        (lambda: Encoder(16, 2, 4)(torch.zeros(2, 5, 16), torch.zeros(2, 5)), "bool, True at padding"),
        (lambda: Encoder(16, 2, 4)(torch.zeros(2, 5, 16), torch.zeros(2, 4, dtype=torch.bool)), r"\(batch, 5\)"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(make, message):
    with pytest.raises(UsageError, match=message):
        make()
