from gradflow.cli.outline import render_tree
from gradflow.records import Addend, Branch, Join, Problem, Stream, Structure


def structure(*branches, streams=(), problems=()):
    joins = tuple(Join(0, 0, Addend(0, 1.0, 0, 0), (Addend(0, 1.0, 0, 1),), (branch,)) for branch in branches)
    return Structure(joins, tuple(streams), tuple(problems))


def branch(name, module, depth, **changes):
    fields = {"join": name, "kind": "identity", "occurrence": 0, "placement": "pre-norm"}
    return Branch(name=name, module=module, depth=depth, **{**fields, **changes})


def test_branches_stand_below_the_modules_that_add_them():
    text = render_tree(
        structure(
            branch("model.h.0.attn", "model.h.0", 1),
            branch("model.h.0.mlp", "model.h.0", 2),
            branch("model.h.1.attn", "model.h.1", 3, placement="none", kind="projection"),
            branch("head", "", 4, placement="post-norm"),
        )
    )
    assert text == (
        "4 residual branches in 4 joins\n"
        "├─ model.h\n"
        "│  ├─ 0\n"
        "│  │  ├─ model.h.0.attn  (depth 1, identity, pre-norm)\n"
        "│  │  └─ model.h.0.mlp  (depth 2, identity, pre-norm)\n"
        "│  └─ 1\n"
        "│     └─ model.h.1.attn  (depth 3, projection)\n"
        "└─ head  (depth 4, identity, post-norm)"
    )


def test_calls_of_a_shared_module_are_told_apart():
    text = render_tree(structure(branch("b", "block", 1), branch("b#1", "block", 2, occurrence=1)))
    assert "├─ b  (depth 1, identity, pre-norm)" in text
    assert "└─ b#1  (depth 2, identity, pre-norm, call 2 of a shared module)" in text


def test_streams_and_problems_are_listed():
    text = render_tree(
        structure(
            branch("b", "m", 1),
            streams=[Stream("s", "stream", ("input", "b")), Stream("t", "trunk", ())],
            problems=[Problem("opaque module", "m.fused", "a custom kernel"), Problem("tensor", "", "unknown type")],
        )
    )
    assert text.startswith("1 residual branch in 1 join\n")
    assert text.endswith(
        "streams, from input to output:\n"
        "  s  (stream of 2 points, input to b)\n"
        "  t  (trunk of 0 points, no points)\n"
        "\n"
        "could not be followed:\n"
        "  opaque module in m.fused: a custom kernel\n"
        "  tensor: unknown type"
    )


def test_a_model_without_branches_says_so():
    trunk = Stream("layers", "trunk", ("layers.0", "layers.1"))
    text = render_tree(structure(streams=[trunk]))
    assert text.startswith("no residual branches found in this forward pass\n")
    assert "layers  (trunk of 2 points, layers.0 to layers.1)" in text


def test_a_thousand_branches_are_drawn_in_order():
    branches = [branch(f"h.{i}.mlp", f"h.{i}", i + 1) for i in range(1000)]
    lines = render_tree(structure(*branches)).splitlines()
    drawn = [line.split("─ ")[1].split("  ")[0] for line in lines if ".mlp" in line]
    assert drawn == [b.name for b in branches]
