"""On a CUDA device: the figures of the host, no waiting, the same bits, little memory. Skipped where there is none.

`make test-cuda` runs these on a machine whose environment has PyTorch for CUDA, and others with `--device cuda`.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from test_bit_identical import gpt2
from test_nan_guard import Breaks
from torch import nn
from trainings import (
    BATCH,
    TOKENS,
    WIDTH,
    Recurrent,
    ResidualMLP,
    ResNet,
    Shared,
    Task,
    Transformer,
    batches,
    fit,
    monitor,
    same,
    seed,
    trained,
    trainer,
)

import gradflow
from gradflow import device_sums, geometry, statistics

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]


@pytest.fixture(autouse=True)
def _exact():
    """No TF32, no algorithm that adds in a changing order, nothing of another default device."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    torch.set_default_device(None)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    torch.cuda.set_sync_debug_mode("default")


def on_host(value):
    """A nested value with its tensors on the host."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {k: on_host(v) for k, v in value.items()}
    return [on_host(v) for v in value] if isinstance(value, (list, tuple)) else value


def recorded(model, root, device, *, steps=3, dtype=torch.float64, autocast=None, scaler=None, optimizer=None, strict=True, **options):
    """Train on seeded noise by hand; the run."""
    model = model.to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(BATCH, TOKENS, WIDTH, generator=generator).to(device, dtype) for _ in range(steps)]
    optimizer = optimizer(model.parameters()) if optimizer else torch.optim.SGD(model.parameters(), 0.05)
    with gradflow.Recorder(model, optimizer, root, every_n_steps=1, strict=strict, scaler=scaler, **options) as recorder:
        for x in data:
            with recorder.step():
                optimizer.zero_grad()
                with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
                    loss = model(x).float().square().mean() if dtype != torch.float64 else model(x).square().mean()
                (scaler.scale(loss) if scaler else loss).backward()
                if scaler:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
    return recorder.run


def lstm():
    model = Recurrent(nn.LSTM)
    model.rnn.dropout = 0.0
    return model


class Language(nn.Module):
    """A GPT-2 whose tokens are made of a batch of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = gpt2().net.eval()

    def forward(self, x):
        ids = (x[..., 0] * 7).long().remainder(17)
        return self.net(input_ids=ids).logits


MODELS = {
    "transformer": lambda: Transformer(dropout=0.0),
    "checkpointed": lambda: Transformer(dropout=0.0, checkpointing="yes"),
    "checkpointed, reentrant": lambda: Transformer(dropout=0.0, checkpointing="reentrant"),
    "convolutions and batch norm": ResNet,
    "lstm": lstm,
    "shared weights": Shared,
    "multilayer perceptron": ResidualMLP,
    "gpt2": Language,
}


def differences(one, other, tolerance):
    """Cells of two runs that differ: (table, column, row, one, other)."""
    found = []
    for table in ("steps", "branches", "streams", "layers", "parameters", "attention"):
        rows, others = (sorted(r.table(table).to_pylist(), key=lambda row: [str(v) for v in row.values() if isinstance(v, (str, int))][:3]) for r in (one, other))
        assert len(rows) == len(others), table
        for row, wanted in zip(rows, others, strict=True):
            for column, value in wanted.items():
                got = row[column]
                if column == "seconds" or (got is None and value is None):
                    continue
                if column in {"grad_zeros", "grad_zero_fraction"}:
                    continue  # gradients that cancel are zero or rounding, by the order of their sum
                if isinstance(value, float) and isinstance(got, float):
                    if not math.isclose(got, value, rel_tol=tolerance, abs_tol=tolerance * 1e-3):
                        found.append((table, column, row.get("layer") or row.get("branch") or row.get("point"), got, value))
                elif column == "point" and {got, value} <= {"inner", "view_as"}:
                    continue  # FSDP hands its modules' outputs on through a view
                elif got != value:
                    found.append((table, column, row.get("layer") or row.get("branch") or row.get("point"), got, value))
    return found


@pytest.mark.filterwarnings("ignore:RNN module weights are not part")
@pytest.mark.parametrize("name", MODELS)
def test_every_figure_is_the_one_that_the_host_gives(name, tmp_path):
    seed()
    model = MODELS[name]()
    host = recorded(copy.deepcopy(model), tmp_path / "host", "cpu")
    device = recorded(model, tmp_path / "device", "cuda")
    assert len(host.branches) == len(device.branches) > 0
    assert not differences(device, host, 1e-6)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_figures_under_autocast_are_those_of_full_precision_but_for_rounding(precision, tmp_path):
    seed()
    model = Transformer(dropout=0.0)
    exact = recorded(copy.deepcopy(model), tmp_path / "exact", "cuda", steps=1)
    low = recorded(model, tmp_path / "low", "cuda", steps=1, dtype=torch.float32, autocast=precision)
    for table, column in [("branches", "branch_sq"), ("branches", "grad_fork_sq"), ("streams", "out_sq"), ("layers", "grad_out_sq"), ("parameters", "grad_sq")]:
        got, wanted = (torch.tensor(run.table(table)[column].to_pylist()[:2], dtype=torch.float64) for run in (low, exact))
        assert torch.allclose(got, wanted, rtol=0.1, atol=0), (table, column, got, wanted)


def test_the_loss_scale_on_the_device_is_divided_out(tmp_path):
    seed()
    model = Transformer(dropout=0.0)
    plain = recorded(copy.deepcopy(model), tmp_path / "plain", "cuda", dtype=torch.float32)
    scaled = recorded(model, tmp_path / "scaled", "cuda", dtype=torch.float32, scaler=torch.amp.GradScaler("cuda", init_scale=1024.0))
    assert scaled.table("steps")["loss_scale"].to_pylist() == [1024.0] * 3
    for table, column in [("steps", "loss"), ("steps", "grad_norm"), ("branches", "grad_fork_sq"), ("layers", "grad_out_sq"), ("parameters", "grad_sq")]:
        got, wanted = (run.table(table)[column].to_pylist()[0] for run in (scaled, plain))
        assert got == pytest.approx(wanted, rel=1e-3), (table, column)


def test_an_overflow_that_the_loss_scaler_skips_is_no_fault(tmp_path):
    seed()
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    run = recorded(Transformer(dropout=0.0), tmp_path / "run", "cuda", steps=4, dtype=torch.float32, autocast=torch.float16, scaler=scaler)
    assert not [f for f in gradflow.diagnose(run) if f.code == "nonfinite"]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("guard", [False, True], ids=["sampled", "guarded"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "lstm"])
def test_no_step_waits_for_the_device(name, guard, autocast, tmp_path):
    seed()
    model = MODELS[name]().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    data = [torch.randn(BATCH, TOKENS, WIDTH, device="cuda") for _ in range(8)]
    with gradflow.Recorder(model, optimizer, tmp_path / "run", every_n_steps=100 if guard else 1, strict=True, nan_guard=guard) as recorder:
        for number, x in enumerate(data):
            with recorder.step():
                if number > 1:  # libraries set themselves up, and wait, at their first calls
                    torch.cuda.set_sync_debug_mode("error")
                optimizer.zero_grad()
                with torch.autocast("cuda", torch.bfloat16, enabled=autocast is not None):
                    loss = model(x).float().square().mean()
                loss.backward()
                optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
    assert recorder.run.steps == ([0, 1, 2, 4] if guard else list(range(8)))


CASES = {
    "transformer with dropout": lambda: Task(Transformer()),
    "resnet with batch norm": lambda: Task(ResNet(), "sgd"),
    "lstm": lambda: Task(Recurrent(nn.LSTM)),
    "gpt2": gpt2,
    "shared weights": lambda: Task(Shared()),
    "fused optimizer": lambda: Task(ResidualMLP(dropout=0.2), "fused"),
    "lbfgs": lambda: Task(ResidualMLP(), "lbfgs"),
    "checkpointing": lambda: Task(Transformer(checkpointing="yes")),
    "reentrant checkpointing": lambda: Task(Transformer(checkpointing="reentrant")),
}
PRECISIONS = ["32-true", "16-mixed", "bf16-mixed", "bf16-true"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_training_ends_in_the_same_bits(name, precision, tmp_path):
    if name == "lbfgs" and precision == "16-mixed":
        pytest.skip("a loss scaler takes no closure")
    pair = [
        trained(tmp_path, CASES[name], every=every, accelerator="gpu", precision=precision, gradient_clip_val=0.5 if name == "gpt2" else None)
        for every in (None, 1)
    ]
    for what in ("losses", "state", "optimizers", "random"):
        assert same(*(on_host(getattr(end, what)) for end in pair)), what
    assert pair[1].monitor.run.steps[0] == 0
    assert not pair[1].monitor.run.problems


def test_a_sampled_step_needs_little_more_memory(tmp_path):
    """A copy of the weights, and besides it a few per cent of what the step itself needs."""
    seed()
    wide = nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, 1024, 0.0, batch_first=True, norm_first=True), 6, enable_nested_tensor=False).cuda()
    optimizer = torch.optim.SGD(wide.parameters(), 1e-3)
    x = torch.randn(16, 256, 256, device="cuda")
    peaks = {}
    with gradflow.Recorder(wide, optimizer, tmp_path / "run", every_n_steps=4, strict=True) as recorder:
        for number in range(9):
            torch.cuda.reset_peak_memory_stats()
            with recorder.step():
                optimizer.zero_grad()
                wide(x).square().mean().backward()
                optimizer.step()
            peaks[number] = torch.cuda.max_memory_allocated()
    weights = sum(p.numel() * p.element_size() for p in wide.parameters())
    assert peaks[8] - peaks[7] < weights + 0.1 * peaks[7], peaks
    assert peaks[5] <= peaks[3] * 1.01, peaks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_is_recorded_and_compiled_once(mode, tmp_path):
    def train(root=None):
        seed()
        torch._dynamo.reset()
        model = torch.compile(Transformer(dropout=0.0).cuda(), mode=mode)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        recorder = gradflow.Recorder(model, optimizer, root, every_n_steps=4, strict=True) if root else None
        losses = []
        for number in range(10):
            x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(number)).cuda()
            with recorder.step() if recorder else nullcontext():
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                optimizer.step()
            losses.append(float(loss))
        if recorder:
            recorder.close()
        return losses, recorder, torch._dynamo.utils.counters["stats"]["unique_graphs"]

    torch._dynamo.utils.counters.clear()
    torch.use_deterministic_algorithms(False)
    expected, _, graphs = train()
    torch._dynamo.utils.counters.clear()
    losses, recorder, watched = train(tmp_path / "run")
    assert losses == pytest.approx(expected, rel=1e-3)
    assert watched == graphs
    assert recorder.run.steps == [0, 1, 2, 4, 8]
    assert len(recorder.run.branches) == 4


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "sampled"])
@pytest.mark.parametrize("how", ["forward", "backward"])
def test_what_breaks_is_named_with_its_layer_and_direction(how, guard, tmp_path):
    seed()
    model = Breaks(how).cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with gradflow.Recorder(model, optimizer, tmp_path / "run", every_n_steps=100 if guard else 1, strict=True, nan_guard=guard) as recorder:
        for _ in range(6):
            with recorder.step():
                optimizer.zero_grad()
                model(torch.randn(BATCH, TOKENS, WIDTH, device="cuda")).square().mean().backward()
                optimizer.step()
    (finding,) = [f for f in gradflow.diagnose(recorder.run) if f.code == "nonfinite"]
    assert finding.steps[0] == 5
    assert finding.evidence["direction"] == how
    assert "middle" in finding.where


def test_figures_do_not_depend_on_the_precision_that_the_training_multiplies_with():
    """TF32 has ten bits: of cosines near 1, and of ledgers that add up, nothing would be left."""
    x = torch.randn(64, 256, 384, generator=torch.Generator().manual_seed(0)) + 3
    rows = geometry.sample_rows(x.cuda(), -1, 256)[None]
    exact = geometry.sample_rows(x.double(), -1, 256)[None]
    torch.backends.cuda.matmul.allow_tf32 = True
    assert float(geometry.token_cosine(rows)) == pytest.approx(float(geometry.token_cosine(exact)), rel=1e-6)
    parts = [rows[0] * 0.3, rows[0] * 0.7]
    assert [float(share) for share in geometry.shares(parts, rows[0])] == pytest.approx([0.3, 0.7], rel=1e-6)
    assert float(statistics.dot(rows, rows)) == pytest.approx(float(exact.square().sum()), rel=1e-6)


@pytest.mark.parametrize("kernels", [True, False], ids=["Triton", "PyTorch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 1000, 8192, 8193, 1_000_003, 2**22 + 5, 40_000_000])
def test_sums_of_any_size_and_type_are_those_of_float64(size, dtype, kernels, monkeypatch):
    if kernels:
        assert device_sums._loaded() is not None
    else:
        monkeypatch.setattr(device_sums, "_loaded", lambda: None)
    x, y = (torch.randn(size, device="cuda").to(dtype) for _ in range(2))
    x[::7] = 0
    exact, other = x.double(), y.double()
    found = device_sums.measure(x, ("total", "square", "largest", "zeros", "nonfinite"))
    wanted = {
        "total": exact.sum(), "square": exact.square().sum(), "largest": exact.abs().max(), "zeros": (x == 0).sum(), "nonfinite": 0,
    }  # fmt: skip
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-10, abs=1e-6), name
    assert float(device_sums.dot(x, y)) == pytest.approx(float((exact * other).sum()), rel=1e-10, abs=1e-6)
    assert float(device_sums.distance(x, y)) == pytest.approx(float((exact - other).square().sum()), rel=1e-10)
    x[size // 2], x[-1] = math.inf, math.nan
    broken = device_sums.measure(x, ("square", "largest", "nonfinite"))
    assert math.isnan(float(broken["square"])) and math.isnan(float(broken["largest"]))
    assert float(broken["nonfinite"]) == min(size, 2)


def test_a_gradient_whose_squares_vanish_in_float32_is_not_taken_for_zero(tmp_path):
    seed()
    model = ResidualMLP().cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with gradflow.Recorder(model, optimizer, tmp_path / "run", every_n_steps=1, strict=True) as recorder, recorder.step():
        (model(torch.randn(BATCH, TOKENS, WIDTH, device="cuda")).square().mean() * 1e-28).backward()
        optimizer.step()
    for table, column in [("parameters", "grad_sq"), ("layers", "grad_out_sq"), ("branches", "grad_fork_sq"), ("streams", "grad_sq")]:
        assert all(value > 0 for value in recorder.run.table(table)[column].to_pylist()), table


def test_looking_for_branches_changes_no_random_state():
    seed()
    model = Transformer().cuda()
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    assert len(gradflow.find_branches(model, torch.randn(2, TOKENS, WIDTH, device="cuda", generator=torch.Generator("cuda")))) == 4
    after = torch.cuda.get_rng_state(), torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_training_on_a_stream_of_its_own_gives_the_same_figures(tmp_path):
    seed()
    model = Transformer(dropout=0.0)
    usual = recorded(copy.deepcopy(model), tmp_path / "usual", "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        other = recorded(model, tmp_path / "side", "cuda")
    assert not differences(other, usual, 1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapped", ["ddp", "fsdp2"])
def test_wrapped_for_nccl_the_figures_are_those_of_the_plain_model(wrapped, tmp_path):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    seed()
    model = Transformer(dropout=0.0).double()
    plain = recorded(copy.deepcopy(model), tmp_path / "plain", "cuda")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = model.cuda()
        if wrapped == "ddp":
            model = DistributedDataParallel(model, device_ids=[0])
        else:
            mesh = dist.init_device_mesh("cuda", (1,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        run = recorded(model, tmp_path / "wrapped", "cuda")
    finally:
        dist.destroy_process_group()
    assert not differences(run, plain, 1e-9)


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_on_the_device_writes_its_report(tmp_path):
    seed()
    watching = monitor(tmp_path, 2, report=True)
    fit(trainer(tmp_path, watching, accelerator="gpu", precision="16-mixed", accumulate_grad_batches=2, gradient_clip_val=1.0), Task(Transformer()), batches(12))
    assert watching.run.table("steps")["microbatches"].to_pylist()[0] == 2
    assert (tmp_path / "gradflow" / "report.html").stat().st_size > 50_000
