"""The axis of the features is followed through the operations that move axes."""

import torch
from torch import nn

from gradflow.tracing import Tracer
from gradflow.tracing.axes import features_axis


def _axis_of_output(module, x):
    with Tracer(module) as tracer:
        out = module(x)
        return tracer.nodes[tracer.node_of(out)].channel_dim


class _Steps(nn.Module):
    def __init__(self, *steps):
        super().__init__()
        self.conv, self.lin = nn.Conv2d(3, 8, 1), nn.Linear(8, 8)
        self.steps = steps

    def forward(self, x):
        for step in self.steps:
            x = step(self, x)
        return x


X = torch.randn(2, 3, 4, 5)


def test_a_convolution_puts_the_features_second_and_a_linear_map_last():
    assert _axis_of_output(_Steps(lambda m, x: m.conv(x)), X) == 1
    assert _axis_of_output(_Steps(lambda m, x: m.lin(m.conv(x).permute(0, 2, 3, 1))), X) == -1


def test_patches_flattened_and_transposed_have_the_features_last():
    assert _axis_of_output(_Steps(lambda m, x: m.conv(x).flatten(2).transpose(1, 2)), X) == -1
    assert _axis_of_output(_Steps(lambda m, x: m.conv(x).flatten(2)), X) == 1


def test_a_permutation_there_and_back_leaves_the_features_where_they_were():
    there_and_back = lambda m, x: m.conv(x).permute(0, 2, 3, 1).permute(0, 3, 1, 2)
    assert _axis_of_output(_Steps(there_and_back), X) == 1


def test_elementwise_operations_and_sums_hand_the_axis_on():
    assert _axis_of_output(_Steps(lambda m, x: torch.relu(m.conv(x)) * 2 + m.conv(x)), X) == 1


def test_a_reshape_finds_the_axis_by_its_size_and_what_stands_before_it():
    assert features_axis("reshape", (), (2, 8, 4, 5), 1, (2, 8, 20)) == 1
    assert features_axis("view", (), (2, 20, 8), -1, (2, 4, 5, 8)) == -1
    assert features_axis("view", (), (40, 8), -1, (2, 20, 8)) == -1


def test_pooling_to_vectors_leaves_the_features_last():
    assert features_axis("mean", ((2, 3),), (2, 8, 4, 5), 1, (2, 8)) == -1
