"""A run of the largest size that is promised, written as a recorder would: 1,000 branches at 5,000 sampled steps.

`python tests/huge.py DIRECTORY` writes it; the test and the benchmark of large runs read it.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import runs

from gradflow.store import manifest, parts
from gradflow.store.storage import LocalStorage

PARTS = 40


def write(path: Path, *, branches: int = 1000, steps: int = 5000) -> Path:
    """Write a run with as many layers, parameters and points of its stream as it has branches; half attend."""
    maker = runs.Maker(blocks=branches // 2, steps=np.arange(steps) * 50, prefix="model.decoder.layers")
    storage = LocalStorage(path)
    light = maker.branch_columns()
    shape = (steps, maker.count)
    noise = maker.noise(shape, 0.1)
    maker.layers = [f"{part}.act" for part in maker.parts]
    maker.parameters = [f"{part}.fc.weight" for part in maker.parts]
    kinds = (pa.array(np.zeros(noise.size, dtype=np.int32)), pa.array(["relu"], pa.string()))
    _write(storage, "steps", maker.steps_table())
    _write(storage, "branches", maker.flat("branches", "branch", maker.parts, light))
    stream = (pa.array(np.zeros(steps * (maker.count + 1), dtype=np.int32)), pa.array([maker.prefix], pa.string()))
    points = maker.streams_table(light)
    _write(storage, "streams", points.set_column(points.schema.get_field_index("stream"), "stream", pa.DictionaryArray.from_arrays(*stream).cast(pa.string())))
    del points, light
    _write(storage, "layers", maker.flat("layers", "layer", maker.layers, {
        "kind": kinds, "n": maker.n, "out_sum": 0.4 * maker.n * noise, "out_sq": maker.n * noise, "out_max": 5 * noise, "zeros": np.full(shape, maker.n // 2),
        "dead_units": np.round(20 * maker.progress * noise), "units": np.full(shape, 4 * maker.width), "nonfinite": np.zeros(shape),
        "grad_out_sq": 1e-9 * maker.n * noise, "grad_zeros": np.zeros(shape)}))  # fmt: skip
    weight = maker.width**2 * 4e-4
    _write(storage, "parameters", maker.flat("parameters", "parameter", maker.parameters, {
        "n": maker.width**2, "weight_sq": weight * noise, "grad_sq": 1e-6 * noise, "grad_max": 1e-3 * noise, "grad_zeros": np.zeros(shape),
        "nonfinite": np.zeros(shape), "update_sq": weight * (1.2e-3 * noise) ** 2}))  # fmt: skip
    _write(storage, "attention", maker.attention_table())
    storage.write(manifest.FILE, lambda file: file.write(manifest.dump(maker.meta())))
    return path


def _write(storage, name, rows):
    """The rows in parts of whole steps, as the recorder leaves them behind when a long training ends."""
    per_step = int(np.count_nonzero(rows["step"].to_numpy() == rows["step"][0].as_py()))
    per_part = max(1, -(-rows.num_rows // per_step // PARTS)) * per_step
    for number, start in enumerate(range(0, rows.num_rows, per_part)):
        piece, _ = parts.conform(name, rows.slice(start, per_part))
        storage.write(f"{name}/rank-0-{number}.parquet", lambda file, piece=piece: parts.write_rows(file, [piece]))


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
