"""What a forward pass shows of a network before it is trained."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision import models
from torchvision.ops import StochasticDepth

from cifar_dist.config.errors import UserError
from cifar_dist.model.probe import probe_network


class Network(nn.Module):
    """Nine features of an image, what is under test, and a head of 4 classes."""

    def __init__(self, between, *, features=9):
        super().__init__()
        self.stem, self.between, self.head = nn.Conv2d(3, 9, 4, stride=4), between, nn.Linear(features, 4)

    def forward(self, images):
        return self.head(self.between(self.stem(images).mean((2, 3))))


class Function(nn.Module):
    """A module that calls a function."""

    def __init__(self, function, *parts):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, inputs):
        return self.function(inputs, *self.parts)


def probe(model, *sides, allow=False, num_classes=4):
    return probe_network(
        model, num_classes=num_classes, sides=sides or [16], allow_untracked_randomness=allow, name="mine.py:net"
    )


def batch_norm_by_hand(features):
    return functional.batch_norm(features, None, None, training=True)


class OwnBatchNorm(nn.BatchNorm1d):
    def forward(self, input):
        return super().forward(input).relu()


def on_sequence(inputs, *parts):
    """Call the parts on (length, samples, features), of five lengths, as many as the probe's images."""
    sequence = inputs.expand(5, *inputs.shape)
    for part in parts:
        sequence = part(sequence, sequence, sequence)[0] if isinstance(part, nn.MultiheadAttention) else part(sequence)
    return sequence.mean(0)


UNTRACKED = {
    "functional dropout": (
        Function(functional.dropout),
        r"'between' \(Function\) draws random numbers itself, as functional.dropout",
    ),
    "rand": (Function(lambda inputs: inputs + torch.rand(9)), r"'between' \(Function\) draws random numbers"),
    "own generator": (
        Function(lambda inputs: inputs + torch.rand(9, generator=torch.Generator().manual_seed(1))),
        r"'between' \(Function\) draws random numbers",
    ),
    "Python": (Function(lambda inputs: inputs * random.random()), "draws random numbers from Python's random"),
    "NumPy": (Function(lambda inputs: inputs * np.random.rand()), r"draws random numbers from numpy\.random"),
    "RReLU": (nn.RReLU(), r"'between' \(RReLU\) draws random numbers"),
    "LSTM": (
        Function(lambda inputs, part: part(inputs[:, None])[0][:, 0], nn.LSTM(9, 9, 2, dropout=0.5, batch_first=True)),
        r"'between\.parts\.0' \(LSTM\) draws random numbers",
    ),
    "no samples": (
        Function(lambda inputs, part: part(inputs.flatten()).view_as(inputs), nn.Dropout(0.5)),
        r"'between\.parts\.0' \(Dropout\) gets inputs of shape \[45\] for 5 images",
    ),
    "other rows": (
        Function(lambda inputs, part: part(inputs.T).T, StochasticDepth(0.5, "row")),
        r"\(StochasticDepth\) gets inputs of shape \[9, 5\]",
    ),
    "changing dimension": (
        Function(lambda inputs, part: part(part(inputs).T).T, nn.Dropout(0.5)),
        r"'between\.parts\.0' \(Dropout\) gets inputs of shape",
    ),
    "attention over samples": (
        Function(lambda inputs, part: part(*[inputs[:, None]] * 3)[0][:, 0], nn.MultiheadAttention(9, 1, dropout=0.5)),
        r"'between\.parts\.0' \(MultiheadAttention\) gets inputs of shape \[5, 1, 9\]",
    ),
    "bias_k": (
        Function(on_sequence, nn.MultiheadAttention(9, 1, dropout=0.5, add_bias_kv=True)),
        r"'between\.parts\.0' \(MultiheadAttention\) has add_bias_kv",
    ),
}


@pytest.mark.parametrize("case", UNTRACKED)
def test_random_numbers_that_do_not_follow_the_samples_are_refused_by_name(case):
    part, message = UNTRACKED[case]
    with pytest.raises(UserError, match=message + ".*allow_untracked_randomness=true"):
        probe(Network(part))
    assert "between.parts.0" not in probe(Network(part), allow=True).batch_dims


WRONG = {
    "momentum": (nn.BatchNorm1d(9, momentum=None), r"'between' \(BatchNorm1d\) has no momentum"),
    "batch in evaluation": (nn.BatchNorm1d(9, track_running_stats=False), r"'between' .* set track_running_stats=True"),
    "own forward": (OwnBatchNorm(9), r"'between' \(OwnBatchNorm\) normalizes each rank's images alone"),
    "several ranks": (nn.SyncBatchNorm(9), r"'between' \(SyncBatchNorm\) normalizes each rank's images alone"),
    "by hand": (Function(batch_norm_by_hand), r"'between' \(Function\) normalizes each rank's images alone"),
    "instances": (nn.InstanceNorm1d(9, track_running_stats=True), r"'between' .* set track_running_stats=False"),
    "mixed images": (Function(lambda inputs: inputs - inputs.mean(0)), "mine.py:net mixes the images of a batch"),
    "lazy": (nn.LazyLinear(9), r"'between' \(LazyLinear\) is lazy"),
    "two outputs": (Function(lambda inputs: inputs.repeat(2, 1)), r"a tensor of shape \[10, 4\] for 5 images: it must"),
    "bug": (
        Function(lambda inputs: inputs.nothing),
        r"16 x 16 pixels \(AttributeError: .*\): the other sizes that were tried fail",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_trained_is_refused_by_name(case):
    part, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        probe(Network(part), allow=True)


def test_a_network_without_a_gradient_is_refused():
    with pytest.raises(UserError, match=r"mine\.py:net has nothing to train: its logits must depend on a parameter"):
        probe(Network(nn.Identity()).requires_grad_(False))


def test_auxiliary_outputs_are_refused():
    network = models.googlenet(weights=None, num_classes=4, init_weights=False)
    with pytest.raises(UserError, match=r"returns GoogLeNetOutputs\(logits, .*must return logits \(N, 4\) alone"):
        probe(network, 64)

    class Two(Network):
        def forward(self, images):
            return super().forward(images), None

    with pytest.raises(UserError, match=r"mine\.py:net returns a tuple: it must return logits \(N, 4\) alone"):
        probe(Two(nn.Identity()))


def test_a_size_that_is_too_small_is_refused_with_one_that_works():
    network = nn.Sequential(nn.Conv2d(3, 4, 33), nn.MaxPool2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UserError, match=r"images of 40 x 40 pixels \(RuntimeError: .*\): set image_size=48$"):
        probe(network, 40)
    with pytest.raises(UserError, match="images of 32 x 32 pixels"):  # of a schedule
        probe(network, 32, 64)
    with pytest.raises(UserError, match=r"\(AssertionError: Wrong image height! .*\): set image_size=64$"):
        probe(models.VisionTransformer(64, 32, 1, 1, 8, 8, num_classes=4), 32)


def test_the_dimension_of_the_samples_is_found():
    between = Function(on_sequence, nn.Dropout(0.1), nn.MultiheadAttention(9, 3, dropout=0.1), nn.Dropout(0))
    channels = nn.Sequential(nn.Unflatten(1, (9, 1)), nn.Dropout1d(), nn.Flatten())
    network = Network(nn.Sequential(between, channels))
    network.unused = nn.Dropout(0.3)
    found = probe(network).batch_dims
    assert found == {
        "between.0.parts.0": 1, "between.0.parts.1": 1, "between.0.parts.2": 1, "between.1.1": 0, "unused": None,
    }  # fmt: skip


def test_parameters_without_part_in_the_output_are_found():
    network = Network(nn.Identity())
    assert not probe(network).has_unused_parameters
    network.spare = nn.Linear(2, 2)
    assert probe(network).has_unused_parameters
    network.spare.requires_grad_(False)
    assert not probe(network).has_unused_parameters


def test_the_network_and_the_random_states_stay():
    network = Network(nn.Sequential(nn.BatchNorm1d(9), nn.Dropout(0.5), Function(lambda x: x * random.random())))
    before = {name: value.clone() for name, value in network.eval().state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    probe(network, 16, 8, allow=True)
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_networks_of_torchvision_are_tracked(name):
    network = models.get_model(name, weights=None, num_classes=4)
    drawing = [name for name, part in network.named_modules() if type(part) in (nn.Dropout, StochasticDepth)]
    traits = probe(network, 32)
    assert list(traits.batch_dims) == drawing
    assert set(traits.batch_dims.values()) <= {0, None}
    assert not traits.has_unused_parameters
