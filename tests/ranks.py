"""Trainings of several ranks as real processes on this machine: run as `python ranks.py CASE ROOT RANK WORLD PORT`.

Each case trains on its rank's share of a fixed batch (or on all of it in a world of one), and records into ROOT.
"""

from __future__ import annotations

import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

warnings.simplefilter("ignore")

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from trainings import WIDTH, ResidualMLP, Task, Transformer, monitor, seed, trainer

import gradflow

STEPS, SHARE = 4, 3
torch.set_num_threads(1)


def share(rank: int, world: int) -> torch.Tensor:
    """This rank's examples of all steps, in the order in which it trains on them."""
    everything = torch.randn(STEPS, 2, SHARE, 5, WIDTH, generator=torch.Generator().manual_seed(5))
    return (everything if world == 1 else everything[:, rank : rank + 1]).flatten(0, 2)


class Sharded(Task):
    """A task on this rank's share; stochastic nothing, so that ranks can be compared with one process."""

    def __init__(self, net: nn.Module, rank: int, world: int) -> None:
        super().__init__(net, "sgd")
        self.rank, self.world = rank, world

    def train_dataloader(self):
        return DataLoader(share(self.rank, self.world), batch_size=SHARE * (2 if self.world == 1 else 1))


class Partly(ResidualMLP):
    """A layer takes part in odd steps alone."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.calls = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x + torch.relu(self.unused(x)) if self.calls % 2 else x)


def lightning(root: Path, rank: int, world: int, strategy, net=None, callbacks=(), **options) -> None:
    seed()
    module = Sharded(net or Transformer(dropout=0.0), rank, world)
    mine = {key: options.pop(key) for key in ("strict", "on_finding", "nan_guard") if key in options}
    watching = monitor(root, options.pop("every", 1), **{"strict": True, "on_finding": "ignore", **mine})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = trainer(root, watching, *callbacks, strategy=strategy if world > 1 else "auto", devices=world, num_nodes=1, use_distributed_sampler=False, **options)
        made.fit(module)
    print("done", rank, made.global_step, watching.run.meta["stopped"])


def plain(root: Path, rank: int, world: int, wrap, net=None) -> None:
    """A loop by hand over a wrapped model."""
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=90))
    seed()
    model = wrap(Transformer(dropout=0.0) if net is None else net())
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    if rank == 0:
        from gradflow.store.directories import new_directory

        new_directory(root / "gradflow")
    if world > 1:
        dist.barrier()
    recorder = gradflow.Recorder(model, optimizer, root / "gradflow", every_n_steps=1, strict=True, rank=rank, claim=False, run_id="plain", info={"world_size": world})
    data = share(rank, world).reshape(STEPS, -1, 5, WIDTH)
    for step in range(STEPS):
        with recorder.step():
            optimizer.zero_grad()
            out = model(data[step])
            (out.square().mean() + out.mean()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
    recorder.close()
    print("done", rank)


class Dies(pl.Callback):
    """Rank 1 is killed in the middle."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer, *_):
        if self.rank == 1 and trainer.global_step == 3:
            trainer.callbacks[0].run  # what has been measured is written
            os.kill(os.getpid(), 9)


class Breaks(pl.Callback):
    """A bug of ours on rank 1 alone: the ranks disagree from here."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer, *_):
        if self.rank == 1 and trainer.global_step == 2:
            from gradflow.recorder import recording

            recording.StepInProgress.finish = lambda self: 1 / 0


class BreaksApart(ResidualMLP):
    """At the last step each rank breaks in its own way."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.calls = rank, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == STEPS:
            x = x + ((x * 0).log() if self.rank else (x * 0) / (x * 0))
        return super().forward(x)


class NotANumber(ResidualMLP):
    def forward(self, x):
        return super().forward(x) * float("nan")


def case_ddp(root, rank, world):
    lightning(root, rank, world, pl.strategies.DDPStrategy(process_group_backend="gloo"))


def case_unused(root, rank, world):
    lightning(root, rank, world, pl.strategies.DDPStrategy(process_group_backend="gloo", find_unused_parameters=True), Partly())


def case_accumulated(root, rank, world):
    lightning(root, rank, world, pl.strategies.DDPStrategy(process_group_backend="gloo"), accumulate_grad_batches=2, gradient_clip_val=0.01)


def case_dead(root, rank, world):
    lightning(root, rank, world, pl.strategies.DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=20)), callbacks=[Dies(rank)])


def case_disagree(root, rank, world):
    lightning(root, rank, world, pl.strategies.DDPStrategy(process_group_backend="gloo"), callbacks=[Breaks(rank)], strict=False)


def case_stop(root, rank, world):
    lightning(root, rank, world, pl.strategies.DDPStrategy(process_group_backend="gloo"), NotANumber(), on_finding="stop", max_epochs=50)


def case_guarded(root, rank, world):
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo")
    lightning(root, rank, world, strategy, BreaksApart(rank), every=100, nan_guard=True)


def case_plain_ddp(root, rank, world):
    plain(root, rank, world, nn.parallel.DistributedDataParallel if world > 1 else lambda model: model)


def case_plain_fsdp(root, rank, world):
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrap = lambda model: FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    plain(root, rank, world, wrap if world > 1 else lambda model: model, ResidualMLP)


def case_fully_shard(root, rank, world):
    def wrap(model):
        if world == 1:
            return model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    plain(root, rank, world, wrap)


def case_tensor_parallel(root, rank, world):
    """Both ranks see the whole batch; the block's maps are split."""

    def wrap(model):
        if world == 1:
            return model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tensor",))
        plan = {"inner": ColwiseParallel(output_layouts=Replicate()), "up": ColwiseParallel(), "down": RowwiseParallel()}
        return parallelize_module(model, mesh, plan)

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x):
            x = self.inner(x)
            return x + self.down(torch.relu(self.up(x)))

    original = globals()["share"]
    globals()["share"] = lambda rank, world: original(0, 1)
    plain(root, rank, world, wrap, Split)
    globals()["share"] = original


def case_model_parallel(root, rank, world):
    from pytorch_lightning.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    class Configured(Sharded):
        def configure_model(self):
            if self.world > 1:
                for block in self.net.blocks:
                    fully_shard(block, mesh=self.device_mesh["data_parallel"])
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    seed()
    module = Configured(Transformer(dropout=0.0), rank, world)
    watching = monitor(root, 1)
    strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, process_group_backend="gloo") if world > 1 else "auto"
    made = trainer(root, watching, strategy=strategy, devices=world, use_distributed_sampler=False)
    fit_without_data(made, module)
    print("done", rank, watching.run.meta["stopped"])


def fit_without_data(made, module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit(module)


if __name__ == "__main__":
    cases, root, rank, world, port = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world)}
    for number, case in enumerate(cases.split(",")):
        os.environ["MASTER_PORT"] = str(int(port) + number)  # a store of its own: ranks leave the old one at their own time
        (root / case).mkdir(parents=True, exist_ok=True)
        globals()[f"case_{case}"](root / case, rank, world)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
