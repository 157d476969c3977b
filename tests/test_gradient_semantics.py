"""Recorded gradients are those that were backpropagated: before clipping, without the loss scale, added over micro-batches."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradflow

D = 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.lin = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x):
        return x + torch.tanh(self.lin(self.norm(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.inp, self.blocks, self.out = nn.Linear(D, D), nn.ModuleList(Block() for _ in range(3)), nn.Linear(D, 1)

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def batch(n=4):
    torch.manual_seed(5)
    return torch.randn(n, 5, D)


def recorded(model, optimizer, step, tmp_path, steps=1, **options):
    recorder = gradflow.Recorder(model, optimizer, tmp_path / "run", strict=True, every_n_steps=1, **options)
    for _ in range(steps):
        with recorder.step():
            step()
    recorder.close()
    return recorder.run


def by_name(run, table, column, key):
    return dict(zip(run.table(table)[key].to_pylist(), run.table(table)[column].to_pylist()))


def plain(model, loss):
    """Squared norms of parameter gradients by plain autograd on a copy."""
    twin = copy.deepcopy(model)
    loss(twin).backward()
    return {n: None if p.grad is None else float(p.grad.double().square().sum()) for n, p in twin.named_parameters()}


def check_parameters(run, expected, rel=1e-5):
    got = by_name(run, "parameters", "grad_sq", "parameter")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            assert got[name] == pytest.approx(value, rel=rel), name
    total = math.sqrt(sum(value for value in expected.values() if value is not None))
    assert run.table("steps")["grad_norm"].to_pylist()[0] == pytest.approx(total, rel=rel)


def gradient_columns(run):
    keep = ("grad_out_sq", "grad_fork_sq", "grad_branch_sq", "grad_dot", "gradient_share")
    return [[row[c] for c in keep] for row in run.table("branches").to_pylist()]


def test_micro_batches_add_up_to_the_same_sums(tmp_path):
    model, x = Net(), batch(8)
    whole = recorded(model, torch.optim.SGD(model.parameters(), 0.0), lambda: model(x).sum().backward(), tmp_path / "a")

    def parts():
        for part in x.chunk(4):
            model(part).sum().backward()

    model.zero_grad()
    split = recorded(model, torch.optim.SGD(model.parameters(), 0.0), parts, tmp_path / "b")
    assert split.table("steps")["microbatches"].to_pylist() == [4]
    sums = ("n", "skip_sq", "branch_sq", "dot", "out_sq", "out_max", "grad_out_sq", "grad_fork_sq", "grad_branch_sq", "grad_dot")
    for one, other in zip(whole.table("branches").to_pylist(), split.table("branches").to_pylist()):
        assert [other[c] for c in sums] == pytest.approx([one[c] for c in sums], rel=1e-5, abs=1e-4)
    for table in ("layers", "streams"):
        for one, other in zip(whole.table(table).to_pylist(), split.table(table).to_pylist()):
            for c in ("n", "out_sq", "grad_out_sq", "grad_sq", "zeros", "dead_units"):
                value = one.get(c)
                assert other.get(c) == (None if value is None else pytest.approx(value, rel=1e-5)), (table, c)
    check_parameters(split, plain(model_without_gradients(model), lambda m: m(x).sum()))
    assert split.table("steps")["loss"].to_pylist()[0] == pytest.approx(float(model(x).detach().sum()), rel=1e-5)


def model_without_gradients(model):
    twin = copy.deepcopy(model)
    twin.zero_grad()
    return twin


def test_gradients_are_recorded_before_clipping(tmp_path):
    model, x = Net(), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected = plain(model, lambda m: m(x).square().mean())

    def step():
        model(x).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()

    run = recorded(model, optimizer, step, tmp_path)
    check_parameters(run, expected)
    updates = by_name(run, "parameters", "update_sq", "parameter")
    assert math.sqrt(sum(updates.values())) == pytest.approx(1e-4, rel=1e-2)


def test_the_global_norm_is_there_without_the_table_of_parameters(tmp_path):
    model, x = Net(), batch()
    expected = plain(model, lambda m: m(x).sum())
    run = recorded(model, None, lambda: model(x).sum().backward(), tmp_path, tables="branches")
    assert run.table("parameters").num_rows == 0
    assert run.table("steps")["grad_norm"].to_pylist() == [pytest.approx(math.sqrt(sum(expected.values())), rel=1e-5)]


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.1), lambda p: torch.optim.SGD(p, 0.1, fused=True),
    lambda p: torch.optim.AdamW(p, 0.1, fused=True),
], ids=["unscaled before the step", "fused SGD", "fused AdamW"])  # fmt: skip
@pytest.mark.parametrize("unscale", [False, True])
def test_the_loss_scale_is_divided_out(tmp_path, make, unscale):
    model, x = Net(), batch()
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    reference = gradflow.probe(model, x, loss=lambda y: y.square().mean())

    def step():
        scaler.scale(model(x).square().mean()).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        scaler.step(optimizer)
        scaler.update()

    run = recorded(model, optimizer, step, tmp_path, scaler=scaler)
    expected = {row["parameter"]: row["grad_sq"] for row in reference.table("parameters").to_pylist()}
    check_parameters(run, expected)
    for one, other in zip(gradient_columns(reference), gradient_columns(run)):
        assert other == pytest.approx(one, rel=1e-4)
    head = run.table("steps").to_pylist()[0]
    assert head["loss_scale"] == 1024.0
    assert head["loss"] == pytest.approx(reference.table("steps").to_pylist()[0]["loss"], rel=1e-5)


def test_autocast_to_bfloat16_is_measured_in_the_precision_of_the_training(tmp_path):
    model, x = Net(), batch()

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().square().mean().backward()

    run = recorded(model, torch.optim.SGD(model.parameters(), 0.0), step, tmp_path)
    exact = gradflow.probe(Net().double(), x.double(), loss=lambda y: y.square().mean())
    for one, other in zip(exact.table("branches").to_pylist(), run.table("branches").to_pylist()):
        for c in ("skip_sq", "branch_sq", "out_sq", "grad_out_sq", "grad_fork_sq"):
            assert other[c] == pytest.approx(one[c], rel=0.03), c


@pytest.mark.parametrize(("dtype", "rel"), [(torch.bfloat16, 0.05), (torch.float16, 0.02)])
def test_half_precision_models_are_measured_as_far_as_the_format_goes(dtype, rel):
    model, x = Net(), batch()
    exact = gradflow.probe(copy.deepcopy(model).double(), x.double(), loss=lambda y: y.square().mean() * 64)
    half = gradflow.probe(model.to(dtype), x.to(dtype), loss=lambda y: y.square().mean() * 64)
    for one, other in zip(exact.table("branches").to_pylist(), half.table("branches").to_pylist()):
        for c in ("skip_sq", "branch_sq", "out_sq", "grad_out_sq", "grad_fork_sq", "grad_branch_sq"):
            assert other[c] == pytest.approx(one[c], rel=rel), c


def test_frozen_parameters_have_weights_and_no_gradient(tmp_path):
    model, x = Net(), batch()
    model.blocks[0].requires_grad_(False)
    run = recorded(model, torch.optim.SGD(model.parameters(), 0.1), lambda: model(x).sum().backward(), tmp_path)
    check_parameters(run, plain(model_without_gradients(model), lambda m: m(x).sum()))
    assert by_name(run, "parameters", "grad_sq", "parameter")["blocks.0.lin.weight"] is None
    assert by_name(run, "parameters", "update_sq", "parameter")["blocks.0.lin.weight"] is None
    assert run.table("branches")["grad_branch_sq"].to_pylist()[0] > 0


def test_parameters_that_get_no_gradient_are_null(tmp_path):
    model, x = Net(), batch()
    model.unused = nn.Linear(2, 2)
    run = recorded(model, torch.optim.SGD(model.parameters(), 0.1), lambda: model(x).sum().backward(), tmp_path)
    row = next(r for r in run.table("parameters").to_pylist() if r["parameter"] == "unused.weight")
    assert (row["grad_sq"], row["grad_max"], row["grad_zeros"], row["nonfinite"]) == (None, None, None, None)
    assert row["weight_sq"] == pytest.approx(float(model.unused.weight.detach().square().sum()))


def test_sparse_gradients_are_those_of_the_dense_ones(tmp_path):
    class Sparse(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.emb, self.lin = nn.Embedding(10, D, sparse=sparse), nn.Linear(D, D)

        def forward(self, ids):
            x = self.emb(ids)
            return x + self.lin(x)

    ids = torch.tensor([[1, 2, 2, 7]])
    rows = [
        gradflow.probe(Sparse(sparse), ids, loss=lambda y: y.square().sum()).table("parameters").to_pylist()[0]
        for sparse in (False, True)
    ]
    for column in ("n", "weight_sq", "grad_sq", "grad_max", "grad_zeros", "nonfinite"):
        assert rows[1][column] == pytest.approx(rows[0][column], rel=1e-6)
    assert rows[0]["grad_zeros"] == 7 * D
    model = Sparse(sparse=True)
    optimizer = torch.optim.SparseAdam(model.emb.parameters(), 0.1)

    def step():
        model(ids).square().sum().backward()
        optimizer.step()

    run = recorded(model, optimizer, step, tmp_path)
    assert by_name(run, "parameters", "update_sq", "parameter")["emb.weight"] == pytest.approx(3 * D * 0.01, rel=1e-3)


def test_lora_is_measured_on_its_own_parameters(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False))
    x = batch()
    trained = [p for p in model.parameters() if p.requires_grad]
    run = recorded(model, torch.optim.SGD(trained, 0.1), lambda: model(x).sum().backward(), tmp_path)
    check_parameters(run, plain(model_without_gradients(model), lambda m: m(x).sum()))
    assert run.table("branches").num_rows == 3
    base = [n for n, v in by_name(run, "parameters", "grad_sq", "parameter").items() if v is not None]
    assert base
    assert all("lora_" in name for name in base)


def test_two_optimizers_in_one_step(tmp_path):
    model, x = Net(), batch()
    first = torch.optim.SGD(model.blocks.parameters(), 0.1)
    second = torch.optim.SGD([*model.inp.parameters(), *model.out.parameters()], 0.2)
    expected = plain(model, lambda m: m(x).square().mean())

    def step():
        model(x).square().mean().backward()
        first.step()
        second.step()

    run = recorded(model, [first, second], step, tmp_path)
    check_parameters(run, expected)
    updates = by_name(run, "parameters", "update_sq", "parameter")
    assert updates["blocks.0.lin.weight"] == pytest.approx(0.01 * expected["blocks.0.lin.weight"], rel=1e-3)
    assert updates["inp.weight"] == pytest.approx(0.04 * expected["inp.weight"], rel=1e-3)


def test_closures_of_lbfgs_count_as_passes_and_the_loss_is_their_mean(tmp_path):
    model, x = Net(), batch()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-4, max_iter=3)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    run = recorded(model, optimizer, lambda: optimizer.step(closure), tmp_path)
    head = run.table("steps").to_pylist()[0]
    assert head["microbatches"] == len(losses) > 1
    assert head["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_teacher_has_forward_columns_alone(tmp_path):
    class Distilled(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = Net(), Net()

        def forward(self, x):
            with torch.no_grad():
                target = self.teacher(x)
            return F.mse_loss(self.student(x), target + 1)

    model, x = Distilled(), batch()
    run = recorded(model, torch.optim.SGD(model.student.parameters(), 0.1), lambda: model(x).backward(), tmp_path)
    rows = {row["branch"]: row for row in run.table("branches").to_pylist()}
    assert len(rows) == 6
    for name, row in rows.items():
        assert row["out_sq"] > 0
        assert (row["grad_out_sq"] is None) == name.startswith("teacher"), name
        assert (row["grad_fork_sq"] is None) == name.startswith("teacher"), name


def test_several_forwards_a_step_have_their_own_occurrence(tmp_path):
    model, x = Net(), batch()

    def step():
        (model(x) - model(2 * x)).square().mean().backward()

    run = recorded(model, torch.optim.SGD(model.parameters(), 0.1), step, tmp_path)
    names = run.table("branches")["branch"].to_pylist()
    assert len(set(names)) == 6
    twice = gradflow.probe(model, 2 * x, loss=lambda y: y.sum()).table("branches").to_pylist()
    second = run.table("branches").to_pylist()[3:]
    assert [row["out_sq"] for row in second] == pytest.approx([row["out_sq"] for row in twice], rel=1e-5)


def test_a_loss_without_gradient_leaves_the_gradient_columns_null():
    model = Net().requires_grad_(False)
    run = gradflow.probe(model, batch())
    assert run.meta["problems"]
    assert run.table("branches")["out_sq"].null_count == 0
    for table, column in (("branches", "grad_fork_sq"), ("layers", "grad_out_sq"), ("parameters", "grad_sq")):
        assert run.table(table)[column].null_count == run.table(table).num_rows > 0
    assert run.table("steps")["grad_norm"].to_pylist() == [None]


def test_not_finite_values_are_counted_and_show_in_the_sums():
    model, x = Net(), batch()
    x[0, 0, 0], x[1, 2, 3] = float("inf"), float("nan")
    row = gradflow.probe(model, x).table("branches").to_pylist()[0]
    assert row["nonfinite"] == 2 * D
    assert math.isnan(row["out_sq"])


def test_clipping_in_lightning_comes_after_the_record(tmp_path):
    import pytorch_lightning as pl

    from gradflow.callbacks import GradientFlowMonitor

    class Task(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, x, _):
            return self.net(x).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    task, data = Task(), batch(8)
    monitor = GradientFlowMonitor(tmp_path, report=False, strict=True, log=False, on_finding="ignore")
    expected = plain(task.net, lambda m: (m(data[:4]).square().mean() + m(data[4:]).square().mean()) / 2)
    trainer = pl.Trainer(
        max_steps=1, accumulate_grad_batches=2, gradient_clip_val=1e-3, callbacks=[monitor], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        default_root_dir=tmp_path,
    )  # fmt: skip
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(task, torch.utils.data.DataLoader(data, batch_size=4))
    run = gradflow.load(tmp_path)
    assert run.table("steps")["microbatches"].to_pylist() == [2]
    check_parameters(run, {f"net.{name}": value for name, value in expected.items()})
