"""Runs made up for tests: raw tables as a recorder would write them, for healthy, sick, huge and hostile models.

The figures follow the closed forms (pre-norm: branch ratio 1/√l, gradient √((L+1)/(l+1)); post-norm: flat) with noise and
a slow drift over training, so that pictures and findings look as they would after real training.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from gradflow import schema
from gradflow.records import Finding
from gradflow.store import Run

TYPES = {"float64": pa.float64(), "int64": pa.int64(), "string": pa.string()}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a & b < c > d \"e\" 'f'",
    "{{ 7*7 }}{% raw %}",
    "$\\frac{1}{2}$ and $x$",
    "]]></style><style>body{display:none}",
    "rtl\u202egnp.exe",
    "null\x00bell\x07escape\x1b[31m",
    "line\nbreak\ttab",
    "层归一化·ノルム·🙂",
    "x" * 300,
    "combining z̸̢̡\u0336\u0336algo",
)


def cadence(last: int, every: int = 50) -> np.ndarray:
    """Steps 0, 1, 2, 4, ... up to `every`, then every `every`, as the recorder samples them."""
    early = [0, *(2**k for k in range(20) if 2**k < every)]
    return np.array([s for s in [*early, *range(every, last + 1, every)] if s <= last], dtype=np.int64)


def table(name: str, rows: int, **columns) -> pa.Table:
    """A raw table with every column of the schema; what is not given is null."""
    arrays = {}
    for column in schema.TABLES[name]:
        kind = TYPES[column.type]
        value = columns.get(column.name, 0 if column.name == "rank" else None)
        if value is None:
            arrays[column.name] = pa.nulls(rows, kind)
        elif column.type == "string":
            arrays[column.name] = pa.DictionaryArray.from_arrays(*value).cast(kind) if isinstance(value, tuple) else pa.array(value, kind)
        else:
            data = np.broadcast_to(np.asarray(value, dtype=np.float64), rows)  # NaN: not recorded
            whole = np.nan_to_num(data).astype(np.int64) if column.type == "int64" else data
            arrays[column.name] = pa.array(whole, kind, mask=np.isnan(data))
    return pa.table(arrays)


def names(keys, steps) -> tuple:
    """Keys of a table of `steps` steps, as (indices, dictionary)."""
    return pa.array(np.tile(np.arange(len(keys), dtype=np.int32), steps)), pa.array(list(keys), pa.string())


def spread(steps: np.ndarray, count: int) -> np.ndarray:
    return np.repeat(steps, count)


class Maker:
    """Draws the figures of one made-up training run."""

    def __init__(self, *, blocks=12, last=1000, every=50, placement="pre-norm", residual=True, seed=0, width=384, prefix="blocks", growth=0.0, decay=1.0, steps=None, light=False):
        self.random = np.random.default_rng(seed)
        self.steps = cadence(last, every) if steps is None else np.asarray(steps, dtype=np.int64)
        self.placement, self.residual, self.width, self.prefix = placement, residual, width, prefix
        self.growth, self.decay, self.light = growth, decay, light
        self.parts = [f"{prefix}.{i}.{part}" for i in range(blocks) for part in ("attn", "mlp")]
        self.count = len(self.parts)
        self.n = 8 * 128 * width
        self.progress = (self.steps / max(1, self.steps[-1]))[:, None]  # (S, 1)
        self.join = np.arange(1, self.count + 1)[None, :]  # (1, L)

    def noise(self, size, scale=0.04):
        return np.exp(self.random.normal(0, scale, size))

    def branch_columns(self):
        S, L = len(self.steps), self.count
        shape = (S, L)
        if self.placement == "pre-norm":
            f = 0.5 + 0.9 * self.progress * (1 + 0.4 * np.cos(self.join))
            start = 1.0 + 3 * self.progress
            skip = start + f * (self.join - 1)
            grad_out = np.sqrt((L + 1) / (self.join + 1))
        else:
            f = 0.55 + 0.1 * np.sin(self.join)
            skip = np.ones(shape)
            grad_out = np.ones(shape) * self.decay ** (L - self.join)
        skip_rms = np.sqrt(skip) * np.exp(self.growth * self.join) * self.noise(shape, 0.01)
        branch_rms = np.sqrt(f) * np.exp(self.growth * self.join) * self.noise(shape)
        cosine = 0.05 * np.sin(self.join) + 0.2 * self.progress + self.random.normal(0, 0.02, shape)
        grad_out = grad_out * 2e-5 * self.noise(shape) * (1.5 - self.progress)
        gain = np.sqrt(1 + (branch_rms / skip_rms) ** 2) if self.placement == "pre-norm" else np.ones(shape) / self.decay ** 0
        gain = gain * self.noise(shape, 0.02)
        branch_gain = 0.8 * branch_rms / skip_rms
        out = skip_rms**2 + branch_rms**2 + 2 * cosine * skip_rms * branch_rms
        share = branch_rms**2 / (branch_rms**2).sum(axis=1, keepdims=True)
        back = branch_gain**2 / (branch_gain**2).sum(axis=1, keepdims=True)
        skip_path = 0.35 - 0.1 * self.progress
        return {
            "n": self.n,
            "skip_sq": skip_rms**2 * self.n,
            "branch_sq": branch_rms**2 * self.n,
            "dot": cosine * skip_rms * branch_rms * self.n,
            "out_sq": out * self.n,
            "out_max": 6 * np.sqrt(out),
            "nonfinite": np.zeros(shape),
            "grad_out_sq": grad_out**2 * self.n,
            "grad_fork_sq": (grad_out * gain) ** 2 * self.n,
            "grad_branch_sq": (grad_out * branch_gain) ** 2 * self.n,
            "grad_dot": 0.0 * grad_out,
            "signal_share": share * (1 - skip_path),
            "gradient_share": back * (1 - skip_path),
        }

    def tables(self):
        S = len(self.steps)
        made = {"steps": self.steps_table()}
        columns = self.branch_columns()
        if self.residual:
            made["branches"] = self.flat("branches", "branch", self.parts, columns)
        made["streams"] = self.streams_table(columns)
        if self.light:  # without layers, parameters and attention, for runs that are huge already
            self.layers = self.parameters = []
            return made
        layers = [f"{part}.{leaf}" for part in self.parts for leaf in ("fc", "act")]
        shape = (S, len(layers))
        active = np.array([leaf.endswith("act") for leaf in layers])
        dead = np.where(active, np.round(4 * self.width * 0.02 * self.progress * self.random.random(shape)), np.nan)
        made["layers"] = self.flat("layers", "layer", layers, {
            "kind": np.where(active, "relu", "Linear").tolist() * S, "n": self.n, "out_sum": 0.1 * self.n * np.ones(shape),
            "out_sq": self.n * self.noise(shape), "out_max": 5 * self.noise(shape), "zeros": np.where(active, self.n * 0.5, 0) * np.ones(shape),
            "dead_units": dead, "units": np.where(active, 4 * self.width, np.nan) * np.ones(shape), "nonfinite": np.zeros(shape),
            "grad_out_sq": 1e-9 * self.n * self.noise(shape), "grad_zeros": np.zeros(shape)})  # fmt: skip
        parameters = [f"{part}.fc.{leaf}" for part in self.parts for leaf in ("weight", "bias")]
        shape = (S, len(parameters))
        matrix = np.array([name.endswith("weight") for name in parameters])
        warm = np.minimum(1, (self.steps[:, None] + 1) / 100)
        made["parameters"] = self.flat("parameters", "parameter", parameters, {
            "n": np.where(matrix, self.width**2, self.width) * np.ones(shape), "weight_sq": np.where(matrix, self.width**2 * 4e-4, self.width * 1e-4) * np.ones(shape),
            "grad_sq": 1e-6 * self.noise(shape, 0.3), "grad_max": 1e-3 * self.noise(shape), "grad_zeros": np.zeros(shape), "nonfinite": np.zeros(shape),
            "update_sq": np.where(matrix, self.width**2 * 4e-4, self.width * 1e-4) * (1.2e-3 * warm * self.noise(shape, 0.3)) ** 2})  # fmt: skip
        made["attention"] = self.attention_table()
        self.layers, self.parameters = layers, parameters
        return made

    def attention_table(self):
        calls = [part for part in self.parts if part.endswith("attn")]
        shape = (len(self.steps), len(calls))
        entropy = np.log(64) * (0.95 - 0.4 * self.progress) * self.noise(shape, 0.03)
        return self.flat("attention", "layer", calls, {
            "entropy": entropy, "entropy_min": 0.6 * entropy, "logit_max": (1 + 6 * self.progress) * self.noise(shape), "keys": 64.5 * np.ones(shape)})  # fmt: skip

    def streams_table(self, columns):
        S, L = len(self.steps), self.count
        first = np.sqrt(columns["skip_sq"][:, :1] / self.n)
        after = np.sqrt(columns["out_sq"] / self.n)
        out = np.concatenate([first, after], axis=1)
        grad = np.sqrt(columns["grad_out_sq"] / self.n)
        grad = np.concatenate([grad[:, :1] * 1.05, grad], axis=1)
        depth = np.arange(L + 1)[None, :]
        collapse = 1 - np.exp(-depth * (0.02 if self.residual else 0.5))
        cosine = np.clip(0.05 + 0.9 * collapse + 0.03 * self.random.random((S, L + 1)), 0, 0.9999 if not self.residual else 0.97)
        blank = np.full((S, L + 1), np.nan)
        signal, back = blank.copy(), blank.copy()
        if self.residual:
            signal[:, 0] = back[:, -1] = (0.35 - 0.1 * self.progress)[:, 0]
        points = self.points()
        return self.flat("streams", "point", points, {
            "stream": [self.prefix] * (S * len(points)), "depth": np.tile(np.arange(len(points)), (S, 1)), "n": self.n, "out_sq": out**2 * self.n,
            "grad_sq": grad**2 * self.n, "token_cosine": cosine, "effective_rank": 1 + 180 * (1 - cosine) * self.noise(cosine.shape),
            "kurtosis": 3.2 * self.noise(cosine.shape), "max_over_median": 8 * self.noise(cosine.shape), "signal_share": signal, "gradient_share": back})  # fmt: skip

    def points(self):
        return ["embed", *(f"{part}:add" if self.residual else part for part in self.parts)]

    def flat(self, name, key, keys, columns):
        S = len(self.steps)
        flat = {}
        for column, value in columns.items():
            flat[column] = value if isinstance(value, (list, tuple)) else np.asarray(value).reshape(-1) if np.ndim(value) else value
        return table(name, S * len(keys), step=spread(self.steps, len(keys)), **{key: names(keys, S)}, **flat)

    def steps_table(self):
        progress = self.progress[:, 0]
        loss = 2.5 + 2.0 * np.exp(-4 * progress) + self.random.normal(0, 0.03, len(self.steps)) if self.residual else 4.0 - 0.9 * np.minimum(1, 8 * progress)
        return table("steps", len(self.steps), step=self.steps, microbatches=1, loss=loss, learning_rate=3e-4 * np.minimum(1, (self.steps + 1) / 100),
                     grad_norm=(0.8 + 2 * np.exp(-10 * progress)) * self.noise(len(self.steps), 0.1), loss_scale=1.0, seconds=0.21 * self.noise(len(self.steps), 0.1))  # fmt: skip

    def meta(self):
        branches = [
            {"name": part, "join": f"{part}:add", "module": part.rsplit(".", 1)[0], "kind": "identity", "occurrence": 0, "depth": i + 1, "placement": self.placement, "stream": self.prefix}
            for i, part in enumerate(self.parts)
        ] if self.residual else []  # fmt: skip
        return {
            "schema_version": 1, "gradflow": "0.1.0", "torch": "2.13.0", "model": "TinyTransformer", "world_size": 1, "precision": "32-true",
            "branches": branches,
            "streams": [{"name": self.prefix, "kind": "stream" if self.residual else "trunk", "points": self.points(), "exact": self.residual}],
            "layers": [{"name": name, "module": name, "kind": "relu" if name.endswith("act") else "Linear", "occurrence": 0, "depth": i} for i, name in enumerate(self.layers)],
            "parameters": [{"name": name, "shape": [self.width, self.width] if name.endswith("weight") else [self.width], "dtype": "float32", "requires_grad": True, "group": "0.0"} for name in self.parameters],
            "optimizers": [{"class": "AdamW", "groups": [{"lr": 3e-4, "eps": 1e-8, "betas": [0.9, 0.999], "weight_decay": 0.01, "momentum": None}]}],
            "config": {"every_n_steps": 50, "rows": 256, "tables": list(schema.TABLES)}, "started": "2026-01-05T10:00:00+00:00", "stopped": None, "problems": [],
        }  # fmt: skip

    def run(self, left_out=(), **meta) -> Run:
        made = self.tables()
        return Run({**self.meta(), **meta}, made, left_out)


def prenorm(**options) -> Run:
    return Maker(**options).run()


def postnorm(**options) -> Run:
    return Maker(placement="post-norm", seed=1, **options).run()


def trunk(**options) -> Run:
    """A plain stack: no joins, tokens become the same, the gradient dies."""
    return Maker(placement="none", residual=False, seed=2, decay=0.8, **options).run()


def exploding(**options) -> Run:
    return Maker(placement="none", seed=3, growth=0.35, decay=1.15, **options).run()


def many(**options) -> Run:
    """Two hundred branches."""
    return Maker(blocks=100, prefix="model.language_model.transformer.layers", **options).run()


def hostile() -> Run:
    """Every name is an attack on the page, a picture or a reader."""
    maker = Maker(blocks=len(HOSTILE) // 2, last=100)
    maker.parts = [f"net.{name}" for name in HOSTILE]
    meta = {"model": HOSTILE[0], "precision": HOSTILE[1], "problems": [{"what": HOSTILE[2], "where": HOSTILE[5], "reason": HOSTILE[7]}]}
    return maker.run(left_out=[f"part {HOSTILE[1]} was left out"], **meta)


def broken(**options) -> Run:
    """The last third of the run is not finite."""
    maker = Maker(**options)
    made = maker.tables()
    bad = maker.steps[-1] * 2 // 3
    for name, frame in made.items():
        late = np.asarray(frame["step"]) > bad
        for i, column in enumerate(schema.TABLES[name]):
            if column.type == "float64" and column.name not in {"seconds", "learning_rate", "loss_scale"}:
                values = frame[column.name].to_numpy().copy()
                known = np.asarray(frame[column.name].is_valid())
                values[late & known] = np.nan
                frame = frame.set_column(i, column.name, pa.array(values, mask=~known))
        made[name] = frame
    return Run({**maker.meta(), "stopped": {"step": int(bad) + 100, "error": "OSError: no space left on device"}}, made)


def empty() -> Run:
    return Run({"schema_version": 1, "model": "Net", "branches": [], "streams": [], "layers": [], "parameters": []}, {name: table(name, 0) for name in schema.TABLES})


def finding(**fields) -> Finding:
    """A finding as a rule would write it."""
    usual = {
        "code": "vanishing-gradient", "severity": "error", "where": ("blocks.0.attn", "blocks.1.mlp"), "steps": (100, 1000),
        "claim": "The gradient at the first block is 4e-5 of that at the last; each join keeps 0.65 of it.",
        "evidence": {"gradient, first over last": 4.1e-5, "threshold": 1e-3, "gain per join": 0.65, "theory": "1.0 for post-norm (b = f)"},
        "why": "Blocks near the input get no gradient and stay as they were initialised (Glorot & Bengio 2010).",
        "remedy": "Add residual connections around each sublayer.", "remedy_2": "Use pre-norm placement, or normalise the layers.", "confidence": "high",
    }  # fmt: skip
    return Finding(**{**usual, **fields})


def findings() -> list[Finding]:
    return [
        finding(),
        finding(code="rank-collapse", where=("blocks",), steps=(0, 1000), claim="Tokens are the same at the output: their mean cosine is 0.9998.",
                evidence={"token cosine at the output": 0.9998, "threshold": 0.95}, why="Attention cannot tell equal tokens apart (Dong 2021).", remedy="Add residual connections."),
        finding(code="update-too-large", severity="warning", where=("blocks.3.mlp.fc.weight",), steps=(400, 600), claim="Updates are 3 % of the weights for 200 steps.",
                evidence={"quantity": "update over weight", "measured": 0.031, "threshold": 1e-2, "threshold_from": "a rule of thumb", "expected": None}, why="The weights lose what they learned.", remedy="Halve the learning rate.", remedy_2="Lengthen the warm-up.", confidence="low"),
        finding(code="massive-activation", severity="info", where=("blocks.9.mlp",), steps=(1000, 1000), claim="A few elements are 1,200 times the median.",
                evidence={"largest over median": 1200.0}, why="Often benign: an attention sink.", remedy="Nothing, unless you quantise.", remedy_2=""),
    ]  # fmt: skip
