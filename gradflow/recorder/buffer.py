"""The device buffer of a sampled step: measured scalars are collected on the device and travel to the host once.

Nothing here waits for the device. `transfer` starts an asynchronous copy; `Transfer.rows` is read later.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradflow.schema import TABLES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradflow.statistics import Number

Key = tuple[str, str, str]
"""Table, name of the row, column."""
Row = dict[str, Any]

_MERGES = {(table, column.name): column.merge for table, columns in TABLES.items() for column in columns}
_PACK_AT = 2048
"""Scalars that are stacked into one tensor while a step goes on, so that many micro-batches cost little memory."""


@dataclass(slots=True)
class _Pile:
    """What one device has gathered."""

    keys: list[Key] = field(default_factory=list)
    loose: list[Tensor] = field(default_factory=list)
    packed: list[Tensor] = field(default_factory=list)
    gram_keys: list[Key] = field(default_factory=list)
    grams: list[Tensor] = field(default_factory=list)

    def pack(self) -> None:
        if self.loose:
            self.packed.append(torch.stack(self.loose))
            self.loose.clear()


class Buffer:
    """Scalars of one sampled step, by table, row and column; several values of one cell merge as the schema says."""

    def __init__(self) -> None:
        self._piles: dict[torch.device, _Pile] = {}
        self._host: list[Any] = []  # table, name and values of each row in turn

    def put(self, table: str, name: str, values: Mapping[str, Number | None]) -> None:
        """Add measured values to a row, which the caller leaves alone from then on (runs at every measurement).

        None leaves the cell as it is.
        """
        tensors = {column: value for column, value in values.items() if isinstance(value, Tensor)}
        for column, value in tensors.items():
            pile = self._piles.get(value.device) or self._piles.setdefault(value.device, _Pile())
            pile.keys.append((table, name, column))
            pile.loose.append(value if value.dtype == torch.float64 else _widened(value))
            if len(pile.loose) >= _PACK_AT:
                pile.pack()
        if tensors:
            values = {column: value for column, value in values.items() if column not in tensors}
        self._host += table, name, values  # flat: a tuple each would be kept, and looked at by the garbage collector

    def put_grams(self, table: str, names: list[str], column: str, grams: Tensor) -> None:
        """Add matrices (k, n, n), one a row, whose decomposition is left to the host."""
        pile = self._piles.setdefault(grams.device, _Pile())
        pile.gram_keys.extend((table, name, column) for name in names)
        pile.grams.append(grams)

    def transfer(self) -> Transfer:
        """Start the one copy to the host; the buffer is empty afterwards."""
        shipments = []
        for device, pile in self._piles.items():
            pile.pack()
            scalars = torch.cat(pile.packed) if pile.packed else torch.zeros(0, dtype=torch.float64)
            parts = [scalars, *(gram.flatten().to(scalars.dtype) for gram in pile.grams)]
            flat = torch.cat(parts) if len(parts) > 1 else scalars
            shipments.append(_Shipment(pile, [tuple(gram.shape) for gram in pile.grams], *_sent(flat, device)))
        transfer = Transfer(shipments, self._host)
        self._piles, self._host = {}, []
        return transfer


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.device.type == "mps" else value.double()


def _sent(flat: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
    """The tensor on the host, and the event after which it may be read (None: at once)."""
    if device.type != "cuda":
        return flat.cpu() if device.type != "cpu" else flat, None
    host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    host.copy_(flat, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return host, event


@dataclass(slots=True)
class _Shipment:
    pile: _Pile
    shapes: list[tuple[int, ...]]
    host: Tensor
    event: torch.cuda.Event | None


class Transfer:
    """A step's figures on their way to the host."""

    def __init__(self, shipments: list[_Shipment], host: list[Any]) -> None:
        self._shipments = shipments
        self._host = host

    def values(self) -> tuple[dict[tuple[str, str], Row], list[tuple[Key, Tensor]]]:
        """Merged rows by (table, name), and the matrices that are still to be decomposed. Waits for the copy."""
        rows: dict[tuple[str, str], Row] = {}
        grams: list[tuple[Key, Tensor]] = []
        means: dict[Key, int] = {}
        for shipment in self._shipments:
            if shipment.event is not None:
                shipment.event.synchronize()
            count = len(shipment.pile.keys)
            for key, value in zip(shipment.pile.keys, shipment.host[:count].tolist(), strict=True):
                _merge(rows, means, key, value)
            offset = count
            matrices: list[Tensor] = []
            for shape in shipment.shapes:
                size = shape[0] * shape[1] * shape[2]
                matrices.extend(shipment.host[offset : offset + size].view(shape).unbind(0))
                offset += size
            grams.extend(zip(shipment.pile.gram_keys, matrices, strict=True))
        for table, name, values in zip(*[iter(self._host)] * 3, strict=True):
            for column, value in values.items():
                if value is not None:
                    _merge(rows, means, (table, name, column), float(value))
        return rows, grams


def _merge(rows: dict[tuple[str, str], Row], means: dict[Key, int], key: Key, value: float) -> None:
    """Add one value to its cell by the column's merge rule."""
    table, name, column = key
    row = rows.setdefault((table, name), {})
    old = row.get(column)
    merge = _MERGES[table, column]
    if old is None:
        row[column] = value
    elif merge in {"sum", "grad_sum"}:
        row[column] = old + value
    elif merge == "max":
        row[column] = value if value > old or value != value else old  # noqa: PLR0124 (NaN wins)
    elif merge == "min":
        row[column] = value if value < old or value != value else old  # noqa: PLR0124 (NaN wins)
    elif merge == "mean":
        n = means.get(key, 1)
        row[column] = (old * n + value) / (n + 1)
        means[key] = n + 1
