"""The tracer follows whatever the model does with its tensors, and is gone without a trace."""

import gc
import warnings
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint
from traps import D, Net, mlp

from gradflow.discovery import discover, find_branches
from gradflow.tracing import Tracer
from gradflow.tracing.operations import operation

X = torch.randn(4, D, generator=torch.Generator().manual_seed(0))


def block():
    return Net(lambda m, x: x + m.f(m.n(x)), f=mlp(), n=nn.LayerNorm(D))


def stack(n=2, call=None):
    """A stem and n blocks, each called by `call(block, x)`."""

    def forward(m, x):
        x = m.stem(x)
        for b in m.b:
            x = b(x) if call is None else call(b, x)
        return x

    return Net(forward, stem=nn.Linear(D, D), b=nn.ModuleList(block() for _ in range(n)))


def names(model, *args):
    return [b.name for b in find_branches(model, *args)]


TWO = ["b.0.f", "b.1.f"]


# ------------------------------------------------------------------------------------------- what an operation is


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (torch.add, "add"), (torch.Tensor.add_, "add"), (torch.Tensor.__iadd__, "add"), (torch.Tensor.__radd__, "add"),
        (torch.ops.aten.add.Tensor, "add"), (torch.Tensor.__rsub__, "sub"), (torch.true_divide, "div"),
        (torch.nn.functional.conv2d, "conv"), (torch.Tensor.T.__get__, "transpose"), (torch.Tensor.__rdiv__, "rdiv"),
    ],
)  # fmt: skip
def test_function_method_operator_and_inplace_form_have_one_name(func, name):
    assert operation(func).name == name


@pytest.mark.parametrize("func", [torch.Tensor.shape.__get__, torch.Tensor.size, torch.Tensor.requires_grad.__get__])
def test_what_gives_no_signal_is_not_traced(func):
    assert operation(func).unseen


# ------------------------------------------------------------------------------------------- observers


class Recorder:
    """Notes what a tracer tells."""

    watches = frozenset({"add", "sub"})

    def __init__(self):
        self.before_args, self.made, self.calls, self.backwards = [], [], [], []

    def before(self, op, func, args, kwargs, operands):
        self.before_args.append((op, [a.clone() if isinstance(a, torch.Tensor) else a for a in args], operands))
        return len(self.before_args)

    def after(self, node, op, func, args, kwargs, out, token):
        self.made.append((node, token))

    def entered(self, call, path, module, args, kwargs):
        self.calls.append(("in", call, path))

    def exited(self, call, path, module, output):
        self.calls.append(("out", call, path, output is None))

    def backward(self, name, args):
        self.backwards.append(name)

    def backward_done(self, name):
        self.backwards.append(f"{name} done")

    def fault(self, error):
        raise error


def observed(forward, *args):
    seen = Recorder()
    with Tracer(Net(forward), seen) as tracer:
        tracer.model(*args)
    return seen, tracer.take()


def test_operands_come_before_they_are_overwritten_and_in_mathematical_order():
    def forward(m, x):
        y = x * 2
        y += 1
        y -= x
        return 3 - y

    seen, graph = observed(forward, X)
    assert [op for op, _, _ in seen.before_args] == ["add", "sub", "sub"]
    torch.testing.assert_close(seen.before_args[1][1][0], X * 2 + 1)
    assert seen.before_args[2][1][0] == 3
    assert seen.before_args[2][2][0] is None
    assert [token for _, token in seen.made] == [1, 2, 3]
    assert all(graph.nodes[node].op in {"add", "sub"} for node, _ in seen.made)


def test_operands_by_keyword_are_operands():
    seen, _ = observed(lambda m, x: torch.add(input=x, other=x * 2, alpha=2), X)
    _, args, operands = seen.before_args[0]
    torch.testing.assert_close(args[1], X * 2)
    assert None not in operands


def test_calls_begin_and_end_in_order_also_when_a_forward_raises():
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError("the model's own")

    def forward(m, x):
        with pytest.raises(ValueError, match="own"):
            m.bad(x)
        return m.good(x) + x

    seen = Recorder()
    model = Net(forward, bad=Fails(), good=nn.Linear(D, D))
    with Tracer(model, seen) as tracer:
        model(X)
        assert tracer.depth == 0
    assert [(kind, path) for kind, _, path, *_ in seen.calls] == [
        ("in", ""), ("in", "bad"), ("out", "bad"), ("in", "good"), ("out", "good"), ("out", ""),
    ]  # fmt: skip
    assert next(scope for scope in (n.scope for n in tracer.take().nodes[::-1])) == ""


@pytest.mark.parametrize("how", ["method", "function", "grad"])
def test_a_backward_pass_under_the_mode_is_announced_and_not_traced(how):
    model, seen = stack(call=lambda b, x: checkpoint(b, x, use_reentrant=False)), Recorder()
    with Tracer(model, seen) as tracer:
        loss = model(X).sum()
        before = len(tracer.nodes)
        if how == "method":
            loss.backward()
        elif how == "function":
            torch.autograd.backward(loss)
        else:
            torch.autograd.grad(loss, list(model.parameters()))
        assert len(tracer.nodes) == before
    name = "grad" if how == "grad" else "backward"
    assert seen.backwards == [name, f"{name} done"]


# ------------------------------------------------------------------------------------------- passes


def test_equal_passes_have_equal_fingerprints_and_others_have_not():
    model = stack()
    tracer = Tracer(model)
    prints = []
    for n in (1, 1, 2):
        with tracer:
            for _ in range(n):
                model(X)
        prints.append(tracer.fingerprint())
        tracer.take()
    assert prints[0] == prints[1] != prints[2]


def test_a_root_whose_forward_is_never_called_is_traced_from_its_step():
    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = stack()

        def training_step(self, batch):
            x, y = batch
            with torch.no_grad():
                target = self.net(x * 1.0)
            return nn.functional.mse_loss(self.net(x * 1.0), target + y)

    task = Task()
    with Tracer(task) as tracer:
        task.training_step((X, X))
    graph = tracer.take()
    assert graph.nodes[0].op == "input"
    assert {c.module for c in graph.calls if c.parent == -1} == {"net"}
    assert {c.grad for c in graph.calls if c.module == "net"} == {True, False}


def test_edges_are_those_of_the_moment_even_if_the_tensor_is_overwritten_later():
    def forward(m, x):
        y = m.f(x)
        m.node = m.tracer.node_of(y)
        m.edge = (y.grad_fn, y.output_nr)
        y += 1
        return y

    model = Net(forward, f=nn.Linear(D, D))
    tracer = Tracer(model)
    object.__setattr__(model, "tracer", tracer)
    with tracer:
        model(X)
    assert tracer.edge(model.node) == model.edge
    assert tracer.edge(model.node + 1) != model.edge


def test_no_activation_is_kept_alive():
    alive = []

    def forward(m, x):
        with torch.no_grad():
            y = m.f(x)
            gone = weakref.ref(y)
            y = m.f(y)
            alive.append(gone() is not None)
        return x

    find_branches(Net(forward, f=mlp()), X)
    gc.collect()
    assert alive == [False]


def test_a_long_pass_costs_little_memory_and_time():
    def forward(m, x):
        h = torch.zeros_like(x)
        for _ in range(3000):
            h = torch.tanh(m.w(x) + m.u(h))
        return h

    graph, structure = discover(Net(forward, w=nn.Linear(D, D), u=nn.Linear(D, D)), X[:1])
    assert len(graph.nodes) > 12_000
    assert graph.nodes[-1].ancestors.bit_count() > 12_000
    assert not structure.joins


# ------------------------------------------------------------------------------------------- inputs and outputs


@dataclass
class Batch:
    x: torch.Tensor
    label: int = 3


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: {"a": {"b": [x, None]}}, lambda b: b["a"]["b"][0]),
        (Batch, lambda b: b.x),
        (lambda x: (x, ("text", 1)), lambda b: b[0]),
    ],
    ids=["dictionaries", "dataclass", "tuples"],
)
def test_inputs_nested_in_structures_are_inputs(wrap, unwrap):
    graph, structure = discover(Net(lambda m, b: unwrap(b) + m.f(unwrap(b)), f=mlp()), wrap(X))
    assert graph.nodes[structure.joins[0].fork].op == "input"


@pytest.mark.parametrize(
    "result",
    [lambda x: {"out": x}, Batch, lambda x: (x, None), lambda x: None, lambda x: [x, {"y": x}]],
    ids=["dictionary", "dataclass", "tuple", "nothing", "list"],
)
def test_any_result_will_do(result):
    assert names(Net(lambda m, x: result(m.b(x)), b=block()), X) == ["b.f"]


# ------------------------------------------------------------------------------------------- what cannot be seen


def test_a_scripted_block_is_one_opaque_step_and_is_reported():
    model = stack(3)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        model.b[1] = torch.jit.script(nn.Sequential(nn.Linear(D, D), nn.ReLU()))
    graph, structure = discover(model, X)
    assert [b.name for b in structure.branches] == ["b.0.f", "b.2.f"]
    assert [(p.what, p.where) for p in structure.problems] == [("RecursiveScriptModule", "b.1")]


class Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


class HandOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return g


@pytest.mark.parametrize("grad", [True, False])
def test_custom_functions_are_followed(grad):
    make = lambda: nn.Parameter(torch.randn(D, D))
    forward = lambda m, x: x + Matmul.apply(torch.relu(Matmul.apply(x, m.w)), m.v)
    with torch.set_grad_enabled(grad):
        assert len(names(nn.Sequential(nn.Linear(D, D), Net(forward, w=make(), v=make())), X)) == 1


def test_a_custom_function_on_the_stream_that_hands_on_its_input_does_not_cut_it():
    _, structure = discover(stack(call=lambda b, x: b(HandOn.apply(x))), X)
    assert len(structure.streams) == 1
    assert len(structure.joins) == 2


def test_a_function_transform_inside_the_branch_is_followed():
    forward = lambda m, x: x + torch.func.vmap(m.f)(x)
    assert len(names(nn.Sequential(nn.Linear(D, D), Net(forward, f=mlp())), X)) == 1


@pytest.mark.parametrize(
    ("forward", "scales"),
    [
        (lambda m, x: torch.addcmul(x, m.f(x), m.g, value=torch.tensor(0.5)), [1, 0.5]),
        (lambda m, x: torch.ops.aten.addcmul(x, m.f(x), m.g, value=2), [1, 2]),
        (lambda m, x: torch.addcmul(x, m.f(x), m.g, value=np.float32(0.5)), [1, 0.5]),
        (lambda m, x: torch.addmm(x, m.f(x), m.g, beta=-1), [-1, 1]),
        (lambda m, x: torch.addmm(x, m.f(x), m.g, beta=0), None),  # the first operand is not read
        (lambda m, x: torch.lerp(x, m.f(x), 0.25), [0.75, 0.25]),
        (lambda m, x: torch.lerp(x, m.f(x), 1.0), None),  # nothing is left of x
        (lambda m, x: torch.lerp(m.f(x), m.g, 0.5), None),  # no skip
        (lambda m, x: torch.stack([x, m.f(x)]).sum(0, dtype=torch.float64), [1, 1]),
        (lambda m, x: torch.stack([x, m.f(x)]).sum(-3), [1, 1]),
        (lambda m, x: torch.stack([x, m.f(x)]).sum(), None),
        (lambda m, x: torch.stack([x, m.f(x)]).sum((0, 1)), None),
        (lambda m, x: torch.stack([x + m.f(x)]).sum(0), [1, 1]),
        (lambda m, x: torch.stack([x, m.f(x)]).relu_().sum(0), None),  # no longer what was stacked
        (lambda m, x: torch.stack([x, m.f(x)]).sum(0, keepdim=True), None),  # not followed
        (lambda m, x: torch.stack([x, m.f(x)]).mean(0), None),
    ],
)
def test_the_factors_of_a_fused_sum_are_read(forward, scales):
    net = Net(forward, f=nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)))
    net.g = nn.Parameter(torch.rand(D, D))
    _, structure = discover(nn.Sequential(nn.Linear(D, D), net), torch.randn(D, D))
    found = [[join.skip.scale, *(addend.scale for addend in join.addends)] for join in structure.joins]
    assert found == ([] if scales is None else [scales])


@pytest.mark.filterwarnings("ignore:This overload of add")
@pytest.mark.parametrize(
    ("forward", "scales"),
    [
        (lambda m, x: torch.addcmul(x, 0.5, m.f(x), m.g), [1, 0.5]),
        (lambda m, x: torch.addmm(2, x, m.f(x), m.g), [2, 1]),
        (lambda m, x: torch.addmm(2, x, 3, m.f(x), m.g), [2, 3]),
    ],
)
def test_the_factors_of_a_fused_sum_are_read_in_signatures_of_old(forward, scales):
    test_the_factors_of_a_fused_sum_are_read(forward, scales)


def test_a_fused_sum_into_a_tensor_at_hand_is_followed():
    def forward(m, x):
        with torch.no_grad():
            y = torch.empty_like(x)
            torch.addcmul(x, m.f(x), m.f(x), out=y)
            torch.sum(torch.stack([y, m.f(y)]), 0, out=x)
            return x

    assert len(names(nn.Sequential(nn.Linear(D, D), Net(forward, f=mlp())), X)) == 2


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: torch.addmm(x, m.f(x), x[0]), lambda m, x: torch.addcmul(x, x[:, :3], x),
        lambda m, x: torch.lerp(x, x[:, :3], 0.5), lambda m, x: torch.addcmul(x, x), lambda m, x: torch.lerp(x, x),
        lambda m, x: torch.baddbmm(x, x, x), lambda m, x: torch.stack([x, x]).sum(7), lambda m, x: torch.lerp(x, x, "w"),
        lambda m, x: torch.sum([x, x]), lambda m, x: torch.addcmul(x, x, x, value="v"),
        lambda m, x: torch.addcmul(x, x, x, value=torch.ones(2)), lambda m, x: torch.addmm(1, 2, 3),
    ],
)  # fmt: skip
def test_a_fused_sum_that_raises_raises_what_it_did(forward):
    model = Net(forward, f=mlp())
    with pytest.raises((RuntimeError, TypeError, IndexError)) as plain:
        model(X)
    with pytest.raises(plain.type) as traced:
        discover(model, X)
    assert str(traced.value) == str(plain.value)


def test_a_factor_that_is_a_tensor_is_read():
    forward = lambda m, x: torch.add(x, m.f(x), alpha=torch.tensor(0.5))
    _, structure = discover(nn.Sequential(nn.Linear(D, D), Net(forward, f=mlp())), X)
    (join,) = structure.joins
    assert [addend.scale for addend in join.addends] == [0.5]


def test_an_input_that_a_map_outside_the_model_made_is_data():
    net = Net(lambda m, x: x + torch.relu(m.f(x)) @ m.w, f=nn.Linear(D, D))
    net.w = nn.Parameter(torch.rand(D, D))
    _, structure = discover(nn.Sequential(net), nn.Linear(D, D)(X))
    assert [branch.name for branch in structure.branches] == names(nn.Sequential(net), X) == ["0"]
    assert not structure.problems


# ------------------------------------------------------------------------------------------- wrapped and cast models


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_are_seen_once(reentrant):
    assert names(stack(call=lambda b, x: checkpoint(b, x, use_reentrant=reentrant)), X) == TWO


def test_names_do_not_know_of_checkpoint_wrappers():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model = stack()
    apply_activation_checkpointing(model, check_fn=lambda m: m in set(model.b))
    assert names(model, X) == TWO


@pytest.mark.parametrize("compile_it", [torch.compile, lambda m, backend: (m.compile(backend=backend), m)[1]])
def test_a_compiled_model_is_seen_eagerly_and_not_compiled_again(compile_it):
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    model = compile_it(stack(), backend=backend)
    model(X)
    before = len(compilations)
    assert before
    assert names(model, X) == TWO
    model(X)
    assert len(compilations) == before


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad],
    ids=["inference", "no_grad", "autocast", "grad"],
)
def test_any_mode_will_do(context):
    with context():
        assert names(stack(), X) == TWO


def test_mixed_precision_casts_do_not_hide_the_skip():
    forward = lambda m, x: (x.bfloat16() + m.f(x).bfloat16()).float()
    assert len(names(nn.Sequential(nn.Linear(D, D), Net(forward, f=mlp())), X)) == 1


def test_an_encoder_in_eval_mode_is_looked_into():
    layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True)
    with torch.no_grad():
        found = names(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), X[None])
    assert found[:2] == ["layers.0.self_attn", "layers.0.linear1-linear2"]


# ------------------------------------------------------------------------------------------- and gone


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_in_the_model_nothing_of_ours_is_left(error):
    def forward(m, x):
        m.b(x)
        raise error("the model's own")

    model = Net(forward, b=block())
    with pytest.raises(error, match="own"):
        find_branches(model, X)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not _get_current_function_mode_stack()
