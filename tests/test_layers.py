"""Layers and activation functions, as modules and as functions, are measured as `oracle.py` measures them."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradflow


class Mixed(nn.Module):
    """Activations as modules, as functions and as methods; convolution and sequence layouts."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.act = nn.ReLU()
        self.first, self.gate, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = F.relu6(x.mean(3))
        x = torch.tanh(3 * self.first(x.transpose(1, 2)))
        x = x.clamp(min=0)
        x = x * torch.sigmoid(4 * self.gate(x))
        return self.last(x)

    def by_hand(self, x, tape):
        def layer(name, out, kind, channel=-1, activation=False):
            tape.append((name, oracle.kept(out), kind, channel, activation))
            return out

        x = layer("conv", self.conv(x), "Conv2d")
        x = layer("norm", self.norm(x), "BatchNorm2d")
        x = layer("act", x.clamp_min(0), "ReLU", 1, True)
        x = layer("relu6", torch.where(x.mean(3) > 0, x.mean(3), 0.0), "relu6", 1, True)
        x = layer("first", self.first(x.transpose(1, 2)), "Linear")
        x = layer("tanh", (3 * x).tanh(), "tanh", -1, True)
        x = layer("clamp", torch.maximum(x, torch.tensor(0.0)), "clamp", -1, True)
        gate = layer("gate", self.gate(x), "Linear")
        x = x * layer("sigmoid", 1 / (1 + (-4 * gate).exp()), "sigmoid", -1, True)
        return layer("last", self.last(x), "Linear")


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_layers_are_those_of_the_oracle(dtype, rel):
    torch.manual_seed(0)
    net, x = Mixed().to(dtype), torch.randn(3, 2, 6, 7, dtype=dtype)
    net.conv.bias.data[2] = -50  # a channel that never fires
    net.norm.bias.data[2] = -50
    run = gradflow.probe(net, x, loss=lambda y: y.square().sum())
    reference, tape = Mixed().double(), []
    reference.load_state_dict(net.state_dict())
    reference.by_hand(x.double(), tape).square().sum().backward()
    rows = {row["layer"]: row for row in run.table("layers").to_pylist()}
    assert list(rows) == [name for name, *_ in tape]
    for name, out, kind, channel, activation in tape:
        expected = oracle.layer_columns(kind, out, activation, channel)
        for column, value in expected.items():
            if isinstance(value, float):
                assert rows[name][column] == pytest.approx(value, rel=rel, abs=rel * expected["n"] ** 0.5), (name, column)
            elif dtype == torch.float64 or column != "grad_zeros":
                assert rows[name][column] == value, (name, column)
    assert rows["act"]["dead_units"] >= 1


@pytest.mark.parametrize("make", [
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.Softplus, nn.Hardswish,
    nn.Hardtanh, nn.LeakyReLU, nn.GLU, nn.PReLU, nn.Softsign, nn.Hardsigmoid, nn.LogSigmoid,
], ids=lambda make: make.__name__)  # fmt: skip
def test_activation_modules_are_rows_with_units(make):
    torch.manual_seed(0)
    run = gradflow.probe(nn.Sequential(nn.Linear(3, 4), make()), torch.randn(5, 3))
    last = run.table("layers").to_pylist()[-1]
    assert (last["layer"], last["kind"]) == ("1", make.__name__)
    assert last["units"] == (2 if make is nn.GLU else 4)


@pytest.mark.parametrize(("function", "kind"), [
    (F.relu, "relu"), (torch.relu, "relu"), (lambda x: x.relu(), "relu"), (lambda x: F.relu(x, inplace=True), "relu"),
    (lambda x: x.relu_(), "relu"), (torch.tanh, "tanh"), (F.gelu, "gelu"), (F.silu, "silu"), (F.glu, "glu"),
    (lambda x: F.glu(x, dim=1), "glu"), (torch.sigmoid, "sigmoid"), (lambda x: x.clamp(min=0), "clamp"),
    (lambda x: torch.clamp(x, 0), "clamp"), (lambda x: x.clamp_min(0.0), "clamp_min"), (F.elu, "elu"),
    (lambda x: x.clamp(0, 6), "clamp"), (F.hardtanh, "hardtanh"), (F.softplus, "softplus"),
])  # fmt: skip
def test_activation_functions_are_rows(function, kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 4)

        def forward(self, x):
            return function(self.lin(x))

    rows = gradflow.probe(Net(), torch.randn(5, 3), loss=lambda y: y.sum()).table("layers").to_pylist()
    assert [row["kind"] for row in rows] == ["Linear", kind]
    assert rows[1]["units"] is not None


@pytest.mark.parametrize("function", [lambda x: x.clamp(-1, 1), lambda x: x.clamp(max=2), torch.exp, torch.abs])
def test_other_functions_are_no_activations(function):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 4)

        def forward(self, x):
            return function(self.lin(x))

    assert gradflow.probe(Net(), torch.randn(5, 3)).table("layers")["kind"].to_pylist() == ["Linear"]


def test_dead_units_are_those_of_the_whole_step(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 2, bias=False)
            self.lin.weight.data = torch.eye(2)

        def forward(self, x):
            return F.relu(self.lin(x))

    model = Net()
    recorder = gradflow.Recorder(model, torch.optim.SGD(model.parameters(), 0.0), tmp_path / "run", strict=True)
    with recorder.step():
        for x in ([[1.0, -1.0]], [[-1.0, -2.0]]):
            model(torch.tensor(x)).sum().backward()
    recorder.close()
    row = recorder.run.table("layers").to_pylist()[-1]
    assert (row["units"], row["dead_units"], row["zeros"], row["n"]) == (2, 1, 3, 4)


def test_an_overwritten_output_is_measured_as_the_module_left_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return F.relu_(self.norm(self.conv(x)))

    torch.manual_seed(0)
    rows = {r["layer"]: r for r in gradflow.probe(Net(), torch.randn(6, 2, 5, 5)).table("layers").to_pylist()}
    assert rows["norm"]["zeros"] == 0
    assert rows["norm"]["out_sq"] == pytest.approx(rows["norm"]["n"], rel=1e-3)
    assert 0.3 < rows["relu"]["zeros"] / rows["relu"]["n"] < 0.7
    assert rows["norm"]["grad_out_sq"] == pytest.approx(rows["relu"]["grad_out_sq"], rel=1e-6)
