"""Masks follow the sample, whatever batch it is in."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from cifar_dist.config.errors import UserError
from cifar_dist.data.sampler import derive_seed
from cifar_dist.model.stochastic import Draws, drop_inputs, keep, track_randomness

SAMPLES = torch.tensor([5, 9, 40_000, 1, 0, 77, 3])


def track(module, batch_dim=0):
    """Return a copy of a module in training, tracked as the part 'x' of a network, and its draws."""
    model, draws = nn.Sequential(OrderedDict(x=copy.deepcopy(module))).train(), Draws(torch.device("cpu"))
    draws.set_key(7)
    draws.begin(SAMPLES)
    track_randomness(model, draws, {"x": batch_dim})
    return model.x, draws


CASES = {  # module, shape of the inputs, dimension of the samples
    "elements": (nn.Dropout(0.4), (7, 300), 0),
    "elements in place": (nn.Dropout(0.4, inplace=True), (7, 300), 0),
    "sequence first": (nn.Dropout(0.4), (11, 7, 30), 1),
    "samples last": (nn.Dropout(0.4), (11, 30, 7), 2),
    "channels 1d": (nn.Dropout1d(0.4), (7, 300, 3), 0),
    "channels 2d": (nn.Dropout2d(0.4), (7, 300, 3, 2), 0),
    "channels 3d": (nn.Dropout3d(0.4), (7, 300, 3, 2, 2), 0),
    "channels first": (nn.Dropout2d(0.4), (300, 7, 3, 2), 1),
    "rows": (StochasticDepth(0.4, "row"), (7, 3, 2), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_mask_of_a_sample_does_not_depend_on_its_batch(case):
    module, shape, dim = CASES[case]
    dropout, draws = track(module, dim)
    inputs = torch.rand(shape) + 0.5
    whole = dropout(inputs.clone())
    for order in ([0, 2, 4, 6], [1, 3, 5], [], [6, 2, 5, 0, 1, 4, 3]):
        draws.begin(SAMPLES[order])
        part = inputs.index_select(dim, torch.tensor(order, dtype=torch.int64))
        output = dropout(part)
        assert torch.equal(output, whole.index_select(dim, torch.tensor(order, dtype=torch.int64)))
        assert (output is part) == (case == "elements in place")
    dropped = whole == 0
    torch.testing.assert_close(whole, torch.where(dropped, 0, inputs / 0.6))
    assert not torch.equal(dropped, dropped.roll(1, dim)), "all samples have one mask"
    if "channels" in case:
        assert torch.equal(dropped, dropped.flatten(2).all(2).view(*shape[:2], *[1] * (len(shape) - 2)).expand(shape))
    if case != "rows":
        assert dropped.float().mean() == pytest.approx(0.4, abs=0.05)


def test_masks_differ_by_sample_epoch_module_and_call_but_not_by_step_or_layout():
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    draws, images = Draws(torch.device("cpu")), torch.ones(7, 6, 5, 4)
    track_randomness(model, draws, {"0": 0, "1": 0})

    def mask(module=0, call=0, epoch=7, step=0, layout=torch.contiguous_format):
        draws.set_key(epoch)
        draws.set_step(step)
        draws.begin(SAMPLES)
        return [model[module](images.contiguous(memory_format=layout)) for _ in range(call + 1)][-1]

    first = mask()
    assert torch.equal(first, mask()) and torch.equal(first, mask(step=3))
    assert torch.equal(first, mask(layout=torch.channels_last))
    for other in (mask(module=1), mask(call=1), mask(epoch=8), mask(epoch=7 + 2**40)):
        assert 0.4 < (first == other).float().mean() < 0.6


def test_a_mask_of_all_samples_depends_on_the_step_alone():
    module, draws = track(StochasticDepth(0.4, "batch"))
    kept = []
    for step in range(300):
        draws.set_step(step)
        outputs = []
        for order in ([0, 1, 2], [5], []):
            draws.begin(SAMPLES[order])
            outputs.append(module(torch.ones(len(order), 2, 2)))
        values = torch.cat(outputs).unique()
        assert len(values) == 1 and (values == 0 or values == pytest.approx(1 / 0.6))
        kept.append(bool(values > 0))
    assert sum(kept) / 300 == pytest.approx(0.6, abs=0.1)


def test_the_hash_is_uniform_and_stays():
    draws = Draws(torch.device("cpu"))
    draws.set_key(derive_seed("dropout", 0, 1))
    draws.begin(torch.arange(2000))
    for probability in (0.01, 0.5, 0.9):
        kept = keep(draws.rows(draws.place("x", 0), of_step=False), 1000, probability).double()
        error = (probability * (1 - probability)) ** 0.5
        assert kept.mean() == pytest.approx(1 - probability, abs=4 * error / kept.numel() ** 0.5)
        for each in (kept, kept.T):  # rows and columns have the spread of independent draws, and do not correlate
            assert each.mean(0).std() == pytest.approx(error / len(each) ** 0.5, rel=0.15)
            normed = (each[:, :300] - each.mean()) / error
            products = (normed.T @ normed / len(each)).fill_diagonal_(0)
            assert products.std() == pytest.approx(len(each) ** -0.5, rel=0.1)
    draws.begin(torch.tensor([3]))
    assert [draws.rows(draws.place("x", 0), of_step=False).item() for _ in range(2)] == [3291208917, 3406992479]
    bits = keep(torch.tensor([123456789]), 32, 0.5)[0].int().tolist()
    assert "".join(map(str, bits)) == "10101000101000101001100111101110"
    assert keep(torch.tensor([2**31 - 1, 2**31]), 1, 0.5).tolist() == [[False], [True]]


def test_nothing_is_dropped_in_evaluation_or_without_a_probability():
    for module in (nn.Dropout(0.4), StochasticDepth(0.4, "row"), nn.Dropout(0.0)):
        dropout, _ = track(module)
        dropout.train(module.p == 0)
        images = torch.rand(3, 4)
        assert dropout(images) is images
    everything, _ = track(nn.Dropout(1.0))
    assert (everything(torch.ones(7, 4)) == 0).all()


def test_the_network_stays_what_it_was():
    plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    model, draws = copy.deepcopy(plain), Draws(torch.device("cpu"))
    track_randomness(model, draws, {"self_attn": 0, "dropout": 0, "dropout1": 0, "dropout2": 0})
    assert list(model.state_dict()) == list(plain.state_dict())
    assert isinstance(model.self_attn, nn.MultiheadAttention)
    tokens = torch.rand(7, 5, 8)
    assert torch.equal(model.eval()(tokens), plain.eval()(tokens))
    draws.begin(SAMPLES)
    whole = model.train()(tokens)
    draws.begin(SAMPLES[1::2])
    torch.testing.assert_close(model(tokens[1::2]), whole[1::2])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False, "kdim": 6, "vdim": 10}], ids=["packed", "separate"])
def test_attention_is_torchs_with_the_mask_applied_to_its_weights(monkeypatch, batch_first, options):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=batch_first, **options).train()
    attention, draws = track(plain, 0 if batch_first else 1)
    query, key, value = (torch.rand(7, *shape) for shape in ((5, 8), (4, plain.kdim), (4, plain.vdim)))
    inputs = [each if batch_first else each.transpose(0, 1) for each in (query, key, value)]
    padding = torch.zeros(7, 4, dtype=torch.bool)
    padding[2, 3] = True
    of_heads = torch.rand(14, 5, 4)
    for named in (
        {},
        {"average_attn_weights": False, "attn_mask": torch.ones(5, 4).triu(2).bool()},
        {"attn_mask": of_heads, "key_padding_mask": torch.rand(7, 4)},
        {"key_padding_mask": padding},
    ):
        draws.begin(SAMPLES)
        mask = attention.place.mask(torch.Size([7, 2, 5, 4]), 0.3, torch.float32).flatten(0, 1)
        assert 0 < (mask == 0).float().mean() < 0.6
        monkeypatch.setattr(functional, "dropout", lambda weights, p, mask=mask: weights * mask)
        expected = plain(*inputs, **named)
        draws.begin(SAMPLES)
        for ours, theirs in zip(attention(*inputs, **named), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    draws.begin(SAMPLES)
    assert attention(*inputs, need_weights=False)[1] is None


def test_a_forward_pass_that_is_repeated_in_the_backward_pass_has_the_same_masks():
    dropout, draws = track(nn.Dropout(0.5))
    weight = torch.ones(7, 40, requires_grad=True)
    output = checkpoint(lambda values: dropout(values * 3), weight, use_reentrant=False)
    output.sum().backward()
    assert torch.equal(weight.grad, output)
    draws.begin(SAMPLES)
    output = checkpoint(lambda values: dropout(dropout(values)), weight, use_reentrant=False)
    with pytest.raises(UserError, match="'x' is called 2 times in a forward pass"):
        output.sum().backward()


def test_an_input_that_is_not_as_in_the_probe_is_refused():
    dropout, _ = track(nn.Dropout(0.5))
    never, _ = track(nn.Dropout(0.5), None)
    for module, shape in ((dropout, (6, 7)), (never, (7, 6)), (track(nn.Dropout(0.5), 2)[0], (7, 7))):
        with pytest.raises(UserError, match=r"'x' gets an input of shape .* for 7 images"):
            module(torch.ones(shape))
    draws = Draws(torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"before Draws\.begin"):
        draws.rows(draws.place("x", 0), of_step=False)


def test_inputs_of_the_head_are_dropped_in_training():
    head, draws = nn.Linear(512, 2), Draws(torch.device("cpu"))
    keys, seen = list(head.state_dict()), []
    drop_inputs(head, 0.3, draws)
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    draws.begin(SAMPLES)
    head(torch.ones(7, 512))
    assert seen[0].unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (seen[0] == 0).float().mean() == pytest.approx(0.3, abs=0.05)
    head.eval()(torch.ones(9, 512))
    assert (seen[1] == 1).all()
    assert list(head.state_dict()) == keys
