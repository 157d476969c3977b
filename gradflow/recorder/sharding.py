"""Which parameters a rank records: its shards, and on one rank what is replicated. No collective is started."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


def owned_by(model: nn.Module, rank: int) -> Callable[[nn.Parameter], bool]:
    """Whether `rank` is the one that records a parameter of `model`.

    Of a `DTensor`, every rank records its shard, and of several that hold the same shard the first does. The shards of
    `FullyShardedDataParallel` are recorded by every rank. Everything else is replicated, and recorded by rank 0.
    """
    flat = _flat_shards(model)

    def owned(parameter: nn.Parameter) -> bool:
        mesh: Any = getattr(parameter, "device_mesh", None)
        if mesh is not None:
            return _first_of_its_copies(parameter, mesh)
        return flat.get(id(parameter), rank == 0)

    return owned


def _first_of_its_copies(parameter: Any, mesh: Any) -> bool:
    coordinates = mesh.get_coordinate()
    if coordinates is None:
        return False
    copies = [c for c, placement in zip(coordinates, parameter.placements, strict=True) if placement.is_replicate()]
    return not any(copies) and not any(_outside(mesh))


def _outside(mesh: Any) -> list[int]:
    """Coordinates of this rank along the dimensions of the whole mesh that the parameter's own mesh lacks."""
    whole = mesh._get_root_mesh()  # noqa: SLF001
    names = mesh.mesh_dim_names
    if whole is mesh or names is None or whole.mesh_dim_names is None:
        return []
    pairs = zip(whole.get_coordinate(), whole.mesh_dim_names, strict=True)
    return [coordinate for coordinate, name in pairs if name not in names]


def _flat_shards(model: nn.Module) -> dict[int, bool]:
    """Parameters that `FullyShardedDataParallel` shards, by identity, and whether this rank's shard is recorded."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    found: dict[int, bool] = {}
    if fsdp is None:
        return found
    whole = fsdp.fully_sharded_data_parallel.FullyShardedDataParallel
    for module in model.modules():
        if not isinstance(module, whole):
            continue
        handle = getattr(module, "_handle", None)
        flat = getattr(handle, "flat_param", None)
        if flat is None:
            continue
        replicas = getattr(module, "_inter_node_pg", None)
        sharded = bool(getattr(handle, "uses_sharded_strategy", True))
        first = replicas is None or replicas.rank() == 0
        if sharded:
            found |= {id(parameter): first for parameter in (flat, *(flat._params or ()))}  # noqa: SLF001
    return found
