"""A probe measures one forward and one backward pass, in memory, and leaves the model exactly as found."""

import copy
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradflow
from gradflow.errors import UsageError
from gradflow.plotting.depth_series import scaling


class Block(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.norm, self.lin, self.drop = nn.BatchNorm1d(width), nn.Linear(width, width), nn.Dropout(0.3)

    def forward(self, x):
        return x + self.drop(self.lin(torch.relu(self.norm(x))))


def net(blocks=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *(Block() for _ in range(blocks)), nn.Linear(6, 2))


def state(model):
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()], "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "post": [p._post_accumulate_grad_hooks and len(p._post_accumulate_grad_hooks) for p in model.parameters()],
        "torch": torch.get_rng_state(), "numpy": np.random.get_state()[1].copy(), "python": random.getstate(),
    }  # fmt: skip


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def stepping(model):
    """An optimizer that steps as soon as a gradient is there, as users hang on parameters."""
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: None if p.data.sub_(p.grad) is None else None)


@pytest.mark.parametrize("prepare", [
    lambda m: None, lambda m: m.eval(), lambda m: m(torch.randn(8, 4)).sum().backward(),
    lambda m: m[0].requires_grad_(False), stepping,
], ids=["training", "evaluation", "with gradients", "partly frozen", "optimizer in the backward pass"])  # fmt: skip
def test_the_model_is_left_as_found(prepare):
    model, x = net(), torch.randn(8, 4)
    prepare(model)
    before = state(model)
    run = gradflow.probe(model, x)
    assert run.table("parameters")["grad_sq"].null_count < run.table("parameters").num_rows
    after = state(model)
    assert [key for key in before if not same(before[key], after[key])] == []


def test_the_model_is_left_as_found_when_it_raises():
    model, x = net(), torch.randn(8, 4)
    model.append(nn.Linear(5, 5))
    before = state(model)
    with pytest.raises(RuntimeError, match="shapes"):
        gradflow.probe(model, x)
    assert same(before, state(model))


def test_all_tables_are_there_and_a_single_step():
    class Attend(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    run = gradflow.probe(nn.Sequential(nn.Linear(4, 4), Attend(), nn.ReLU()), torch.randn(2, 3, 4))
    assert run.steps == [0]
    for table in ("steps", "layers", "parameters", "attention", "streams"):
        assert run.table(table).num_rows, table
    assert gradflow.probe(net(), torch.randn(8, 4)).table("branches").num_rows == 2
    assert run.problems == []
    assert [p.name for p in run.parameters] == ["0.weight", "0.bias"]
    assert run.table("parameters")["update_sq"].null_count == 2


def test_a_probe_sees_the_same_as_a_recorded_step(tmp_path):
    model, x = net().eval(), torch.randn(8, 4)
    probed = gradflow.probe(model, x, loss=lambda y: y.sum())
    recorder = gradflow.Recorder(model, None, tmp_path / "run", strict=True)
    with recorder.step():
        model(x).sum().backward()
    recorder.close()
    for table in ("branches", "layers", "streams"):
        assert probed.table(table).equals(recorder.run.table(table)), table


def loss_of(run):
    return run.table("steps")["loss"].to_pylist()[0]


def test_the_default_loss_is_what_the_output_offers():
    class Net(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.lin, self.wrap = nn.Linear(3, 2), wrap

        def forward(self, x):
            return self.wrap(self.lin(x))

    x = torch.ones(4, 3)
    torch.manual_seed(0)
    model = Net(lambda y: y)
    y = model(x).detach()

    def probed(wrap):
        twin = copy.deepcopy(model)
        twin.wrap = wrap
        return loss_of(gradflow.probe(twin, x))

    assert probed(lambda y: y) == pytest.approx(float(y.square().mean()))
    assert probed(lambda y: y.sum()) == pytest.approx(float(y.sum()))
    assert probed(lambda y: {"loss": y.sum() * 2, "y": y}) == pytest.approx(2 * float(y.sum()))
    assert probed(lambda y: (y, [3 * y], torch.arange(3))) == pytest.approx(5 * float(y.square().mean()))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: gradflow.probe(nn.Linear, torch.ones(2)), "got the class Linear itself"),
    (lambda: gradflow.probe([1]), "got a list"),
    (lambda: gradflow.probe(nn.Linear(2, 2), torch.ones(2), loss=3), "function of the model's output, got a int"),
    (lambda: gradflow.probe(nn.Linear(2, 2), torch.ones(2), loss=lambda y: y), r"scalar tensor, got a tensor of shape \(2,\)"),
    (lambda: gradflow.probe(nn.Linear(2, 2), torch.ones(2), loss=lambda y: None), "scalar tensor, got a NoneType"),
    (lambda: gradflow.probe(nn.Identity(), torch.ones(2, dtype=torch.int64)), "floating-point tensors to make a loss of"),
], ids=["class", "list", "number as loss", "loss with a shape", "no loss", "integer output"])  # fmt: skip
def test_bad_input_is_said_in_one_line(call, message):
    with pytest.raises(UsageError, match=message):
        call()


class Odd(nn.Module):
    """Integer, complex, empty and sparse tensors on the way."""

    def __init__(self):
        super().__init__()
        self.emb, self.lin = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4)

    def forward(self, ids):
        x = self.emb(ids + 0)
        x = x + self.lin(x)
        spectrum = torch.fft.fft(x)
        spectrum = spectrum + torch.fft.fft(self.lin(x))
        empty = self.lin(x[:0]) + x[:0]
        counts = ids.sum() + 1
        return torch.fft.ifft(spectrum).real + empty.sum() + x.to_sparse().to_dense() + 0 * counts


def test_tensors_of_every_kind_pass():
    run = gradflow.probe(Odd(), torch.arange(6).view(2, 3))
    rows = run.table("branches").to_pylist()
    assert rows[0]["grad_fork_sq"] > 0
    assert all(row["n"] > 0 or row["out_sq"] == 0 for row in rows)


def test_a_gradient_at_the_input_is_measured_where_it_is_asked_for():
    model, x = nn.Sequential(Block(), Block()).eval(), torch.randn(5, 6)
    assert gradflow.probe(model, x).table("branches")["grad_fork_sq"].to_pylist()[0] is None
    x.requires_grad_()
    run = gradflow.probe(model, x, loss=lambda y: y.square().sum())
    model(x).square().sum().backward()
    assert run.table("branches")["grad_fork_sq"].to_pylist()[0] == pytest.approx(float(x.grad.square().sum()), rel=1e-5)


def prenorm(depth, width=64):
    class Sub(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.lin = nn.LayerNorm(width), nn.Linear(width, width, bias=False)
            nn.init.normal_(self.lin.weight, std=width**-0.5)

        def forward(self, x):
            return x + self.lin(self.norm(x))

    torch.manual_seed(1)
    return nn.Sequential(*(Sub() for _ in range(depth)))


def test_scaling_with_depth_meets_theory():
    x = torch.randn(1, 64, 64).requires_grad_()
    rows = scaling({depth: gradflow.probe(prenorm(depth), x) for depth in (16, 4, 8)})
    assert [row.size for row in rows] == [row.steps for row in rows] == [4, 8, 16]
    for row in rows:
        assert row.signal == pytest.approx(row.size + 1, rel=0.15)
        assert row.expected_signal == pytest.approx(row.size + 1, rel=0.15)
        assert row.expected_gradient == pytest.approx(row.size + 1, rel=0.15)


FACTORY = """
import torch
from torch import nn

def make(depth):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(depth))), torch.randn(4, 16)
"""


def command(tmp_path, *args):
    (tmp_path / "own.py").write_text(FACTORY)
    return subprocess.run([sys.executable, "-m", "gradflow", "probe", "own.py:make", *args], cwd=tmp_path, capture_output=True, text=True)


def test_the_command_plots_how_a_model_scales_with_depth(tmp_path):
    done = command(tmp_path, "--depths", "3,6", "--out", "scaling.svg", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["size"] for row in rows] == [3, 6]
    assert rows[0]["signal"] == pytest.approx(rows[0]["expected_signal"])
    assert "<svg" in (tmp_path / "scaling.svg").read_text()


@pytest.mark.parametrize(("options", "message"), [
    (("--depths", "4,x"), "positive integers"), (("--depths", "2", "--widths", "2"), "got both"),
    (("--depths", "2", "--out", "a.txt"), ".svg, .png, .pdf"),
])  # fmt: skip
def test_the_command_says_what_it_expected(tmp_path, options, message):
    done = command(tmp_path, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
