"""The attention table equals the whole matrix where the sample holds it, and never computes it where it does not."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradflow

B, H, T, E = 2, 3, 7, 5
COLUMNS = ("entropy", "entropy_min", "logit_max", "keys")


class Attention(nn.Module):
    """Projections and a call that a test chooses."""

    def __init__(self, call, heads=H, keys=H):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(E * heads, E * n) for n in (heads, keys, keys))
        self.call = call

    def split(self, x):
        return [f(x).unflatten(-1, (-1, E)).transpose(1, 2) for f in (self.q, self.k, self.v)]

    def forward(self, x):
        return self.call(*self.split(x)).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attn = attention

    def forward(self, x):
        return self.attn(x)


def row(model, x):
    run = gradflow.probe(model, x)
    rows = run.table("attention").to_pylist()
    assert len(rows) == 1
    return rows[0]


def check(model, x, name="attn", **how):
    got = row(model, x)
    q, k, _ = model.attn.split(x)
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    expected = oracle.attention_columns(q, k, **how)
    assert got["layer"] == name
    assert [got[c] for c in COLUMNS] == pytest.approx([expected[c] for c in COLUMNS], rel=1e-10)


def padding():
    mask = torch.ones(B, 1, 1, T, dtype=torch.bool)
    mask[1, ..., 4:] = False
    return mask


def setup(call, **how):
    torch.manual_seed(0)
    return Model(Attention(call, **how)).double(), torch.randn(B, T, E * H, dtype=torch.float64)


@pytest.mark.parametrize("how", [
    {}, {"is_causal": True}, {"attn_mask": padding()}, {"attn_mask": torch.randn(H, T, T).double()}, {"scale": 2.0},
    {"attn_mask": torch.where(padding(), 0.0, float("-inf")).double()}, {"dropout_p": 0.5},
    {"attn_mask": (~padding()).double() * torch.finfo(torch.float64).min},
], ids=["plain", "causal", "padding", "bias", "scale", "minus infinity", "dropout", "smallest number"])  # fmt: skip
def test_scaled_dot_product_attention_is_that_of_the_whole_matrix(how):
    model, x = setup(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **how))
    check(model, x, scale=how.get("scale"), mask=how.get("attn_mask"), causal=how.get("is_causal", False))


def test_grouped_queries_meet_the_keys_of_their_group():
    model, x = setup(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), heads=4, keys=2)
    check(model, torch.randn(B, T, E * 4, dtype=torch.float64))


def by_hand(q, k, v):
    return (q @ k.transpose(-1, -2) / E**0.5).softmax(-1) @ v


def by_einsum(q, k, v):
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * E**-0.5
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
    return torch.einsum("bhij,bhjd->bhid", F.dropout(F.softmax(scores, dim=-1), 0.1), v)


def by_bmm(q, k, v):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    scores = torch.baddbmm(torch.zeros(B * H, T, T).double(), q, k.mT, alpha=E**-0.5)
    return torch.bmm(torch.softmax(scores, 2), v).unflatten(0, (B, H))


def softcapped(q, k, v):
    scores = q @ k.mT * E**-0.5
    scores = torch.tanh(scores / 2.0) * 2.0
    return torch.matmul(torch.nn.functional.softmax(scores, -1, dtype=torch.float64), v)


@pytest.mark.parametrize(("call", "how"), [
    (by_hand, {}), (by_einsum, {"causal": True}), (softcapped, {"softcap": 2.0}),
], ids=["matmul", "einsum and mask", "softcap"])  # fmt: skip
def test_attention_by_hand_is_that_of_the_whole_matrix(call, how):
    model, x = setup(call)
    check(model, x, **how)


def test_heads_folded_into_the_batch_are_heads_each():
    model, x = setup(by_bmm)
    got = row(model, x)
    q, k, _ = model.attn.split(x)
    expected = oracle.attention_columns(q.flatten(0, 1)[None], k.flatten(0, 1)[None])
    assert [got[c] for c in COLUMNS] == pytest.approx([expected[c] for c in COLUMNS], rel=1e-10)


@pytest.mark.parametrize("options", [
    {}, {"batch_first": True}, {"bias": False}, {"kdim": 4, "vdim": 6}, {"add_bias_kv": True}, {"add_zero_attn": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("masked", [None, "padding", "causal", "float"])
def test_multihead_attention_is_that_of_its_weights(options, masked):
    torch.manual_seed(0)
    width, first = E * H, options.get("batch_first", False)
    attn = nn.MultiheadAttention(width, H, **options).double()
    x = torch.randn(B, T, width).double()
    k, v = torch.randn(B, T, attn.kdim).double(), torch.randn(B, T, attn.vdim).double()
    how = {}
    if masked == "padding":
        how["key_padding_mask"] = ~padding()[:, 0, 0]
    elif masked == "causal":
        how["attn_mask"] = torch.ones(T, T).triu(1).bool()
    elif masked == "float":
        how["attn_mask"] = torch.randn(B * H, T, T).double()
    args = [t if first else t.transpose(0, 1) for t in (x, k, v)]

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = attn

        def forward(self, *args):
            return self.attn(*args, need_weights=False, **how)[0]

    run = gradflow.probe(Holder(), *args)
    (got,) = run.table("attention").to_pylist()
    weights = attn(*args, average_attn_weights=False, **how)[1].detach()
    entropy = torch.special.entr(weights).sum(-1)
    assert got["layer"] == "attn"
    assert got["entropy"] == pytest.approx(float(entropy.mean()), rel=1e-9)
    assert got["entropy_min"] == pytest.approx(float(entropy.mean((0, 2)).min()), rel=1e-9)
    assert got["keys"] == pytest.approx(float((weights > 0).sum(-1).double().mean()))


def test_what_is_no_attention_is_not_listed():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(6, 4), nn.Parameter(torch.randn(4, 6, 6))

        def forward(self, x):
            weights = (self.gate(x) @ torch.eye(4)).softmax(-1)
            return torch.einsum("be,eij,bi->bj", weights, self.experts, x).softmax(-1)

    assert gradflow.probe(Router(), torch.randn(3, 6)).table("attention").num_rows == 0


def test_calls_of_one_module_have_names_of_their_own_and_occurrences_merge_over_micro_batches(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            x = self.lin(x)
            x = F.scaled_dot_product_attention(x, x, x)
            return F.scaled_dot_product_attention(x * 3, x, x)

    model = Twice()
    recorder = gradflow.Recorder(model, torch.optim.SGD(model.parameters(), 0.1), tmp_path / "run", strict=True)
    batches = torch.randn(2, 3, 5, 4)
    with recorder.step():
        for x in batches:
            model(x).sum().backward()
    recorder.close()
    rows = recorder.run.table("attention").to_pylist()
    assert [r["layer"] for r in rows] == ["scaled_dot_product_attention", "scaled_dot_product_attention@1"]
    single = [gradflow.probe(model, x).table("attention").to_pylist() for x in batches]
    for i in range(2):
        assert rows[i]["entropy"] == pytest.approx(sum(s[i]["entropy"] for s in single) / 2)
        assert rows[i]["entropy_min"] == pytest.approx(min(s[i]["entropy_min"] for s in single))
        assert rows[i]["logit_max"] == pytest.approx(max(s[i]["logit_max"] for s in single))


def test_long_attention_is_read_from_a_sample(monkeypatch):
    sizes = []
    from gradflow import attention

    real = attention.attention_columns
    monkeypatch.setattr(attention, "attention_columns", lambda logits, *a: sizes.append(tuple(logits.shape)) or real(logits, *a))

    class Long(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    x = torch.randn(8, 40, 300, 4).requires_grad_()
    (got,) = gradflow.probe(Long(), x).table("attention").to_pylist()
    assert sizes == [(1, 1, 32, 16, 300)]
    full = oracle.attention_columns(x[:1, :2], x[:1, :2], causal=True)
    assert got["entropy"] == pytest.approx(full["entropy"], rel=0.1)


@pytest.mark.parametrize("empty", [torch.zeros(0, 2, 3, 4), torch.zeros(2, 2, 0, 4)])
def test_empty_attention_has_no_row(empty):
    class Plain(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    assert gradflow.probe(Plain(), empty.requires_grad_(), loss=lambda y: y.sum()).table("attention").num_rows == 0
