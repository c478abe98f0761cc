"""What ranks say to each other, decide together, and count together."""

import functools
import math
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn

from cifar_dist.config.errors import PeerFailedError, SharedError, UserError
from cifar_dist.config.plan import fit_to_dataset, make_plan
from cifar_dist.data.dataset import LabelledImages
from cifar_dist.model.batch_norm import (
    GhostBatchNorm2d,
    GlobalBatchNorm2d,
    Groups,
    running_statistics,
    share_statistics,
    use_groups,
)
from cifar_dist.records import Observer
from cifar_dist.runtime.distributed import _common_precision
from cifar_dist.training.checkpoint import load_checkpoint
from cifar_dist.training.engine import DivergedError, InterruptedRun
from cifar_dist.training.evaluation import EvaluationSet
from cifar_dist.training.metrics import summarize
from cifar_dist.training.run_directory import RunDirectory, UnwrittenRun
from cifar_dist.training.saving import CheckpointWriter
from cifar_dist.training.session import Session
from cifar_dist.training.setup import build_trainer
from tests.conftest import make_dataset, make_recipe
from tests.worlds.harness import run_world

SHARES = {2: [[0, 1, 2, 3], [4, 5, 6]], 3: [[0, 1, 2, 3], [], [4, 5, 6]]}


def conversation(runtime):
    """Each way in which ranks talk, and what every one of them makes of a failure."""
    ranks, rank, makers = runtime.ranks, runtime.world.rank, []
    told = {
        "exchange": ranks.exchange([rank, math.inf]),
        "from main": ranks.from_main(lambda: makers.append(rank) or {"rank": rank}),
        "makers": makers,
        "in turn": ranks.in_turn(lambda: rank),
    }

    def fail(error):
        raise error

    def outcome(action):
        try:
            action()
        except Exception as error:
            return type(error).__name__, str(error)
        return "none"

    def together(failing):
        with ranks.together():
            if rank in failing:
                raise failing[rank]

    told["mistake of main"] = outcome(lambda: ranks.from_main(lambda: fail(UserError("no such file"))))
    told["accident of main"] = outcome(lambda: ranks.from_main(lambda: fail(KeyError("x"))))
    told["mistake of the last"] = outcome(lambda: together({runtime.world.size - 1: UserError("not here")}))
    told["accident of the last"] = outcome(lambda: together({runtime.world.size - 1: OSError("full")}))
    told["mistakes of all"] = outcome(lambda: together({r: UserError(f"from {r}") for r in range(runtime.world.size)}))
    told["while loading"] = outcome(lambda: ranks.in_turn(lambda: fail(UserError("md5")) if rank == 0 else None))
    told["nothing"] = outcome(lambda: together({}))
    return told


def tiny_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))


def evaluations(runtime):
    """Logits and metrics for 1, 7 and 10,001 samples."""
    results = {}
    for count in (1, 7, 10_001):
        generator = torch.Generator().manual_seed(count)
        images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        data = LabelledImages(images=images, labels=torch.randint(10, (count,), generator=generator))
        held_out = EvaluationSet(
            data=data, indices=torch.arange(count), class_names=tuple("abcdefghij"), recipe=make_recipe(),
            runtime=runtime,
        )  # fmt: skip
        predictions = held_out.predict(tiny_model(), Observer())
        result = summarize(predictions.logits, predictions.labels, held_out.class_names)
        results[count] = (result.num_samples, sum(map(sum, result.confusion_matrix)), result.top1, result.loss)
        results[count] += (predictions.logits.sum(0).tolist(),)
    return results


def batch_norm(runtime):
    """The largest difference between our layer on shares and torch's on the whole batch; one collective a pass."""
    own, differences = SHARES[runtime.world.size][runtime.world.rank], []
    generator = torch.Generator().manual_seed(1)
    for layout in (torch.contiguous_format, torch.channels_last):
        images, gradient = (torch.randn(7, 5, 6, 4, generator=generator, dtype=torch.float64) * 3 + 2 for _ in range(2))
        theirs, model = batch_norm_layers(generator, runtime.world.size)
        for _ in range(2):  # the second time the running statistics are not those of a new layer
            whole = images.clone(memory_format=layout).requires_grad_()
            part = images[own].clone(memory_format=layout).requires_grad_()
            expected = theirs(whole)
            expected.backward(gradient)
            with all_reduces() as calls:
                output = model(part)
                assert len(calls) == 1
                output.backward(gradient[own])
                assert len(calls) == 2
            weight_gradients = torch.stack([model[0].weight.grad, model[0].bias.grad])
            distributed.all_reduce(weight_gradients)
            differences += [
                output - expected[own],
                part.grad - whole.grad[own],
                weight_gradients - torch.stack([theirs.weight.grad, theirs.bias.grad]),
                model[0].running_mean - theirs.running_mean,
                model[0].running_var - theirs.running_var,
            ]
            model.zero_grad()
            theirs.zero_grad()
            images += 1
        model.eval(), theirs.eval()
        differences.append(model(images) - theirs(images))
    return float(torch.cat([each.detach().abs().flatten() for each in differences]).max())


def batch_norm_layers(generator, num_ranks):
    """A BatchNorm of torch's with weights of its own, and ours with the same, in a model."""
    theirs, model = nn.BatchNorm2d(5, dtype=torch.float64), nn.Sequential(nn.BatchNorm2d(5, dtype=torch.float64))
    nn.init.normal_(theirs.weight, generator=generator)
    nn.init.normal_(theirs.bias, generator=generator)
    model[0].load_state_dict(theirs.state_dict())
    share_statistics(model, num_ranks=num_ranks)
    assert isinstance(model[0], GlobalBatchNorm2d)
    assert model[0].state_dict().keys() == theirs.state_dict().keys()
    return theirs, model


@contextmanager
def all_reduces():
    """The calls of all_reduce in this context, in a list that grows."""
    calls, original = [], distributed.all_reduce

    def counting(*arguments, **named):
        calls.append(1)
        return original(*arguments, **named)

    distributed.all_reduce = counting
    try:
        yield calls
    finally:
        distributed.all_reduce = original


def ghost_batch_norm(runtime):
    """Groups of a batch of 11 (uneven) and of 5 (too few: one group), against torch on each group; no collective."""
    world, differences = runtime.world, []
    generator = torch.Generator().manual_seed(2)
    groups = Groups(count=4, num_ranks=world.size)
    model = use_groups(nn.Sequential(nn.BatchNorm2d(3, dtype=torch.float64)), groups)
    assert isinstance(model[0], GhostBatchNorm2d)
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for count in (12, 11, 5, 8):
        images = torch.randn(count, 3, 4, 4, generator=generator, dtype=torch.float64)
        parts = [torch.arange(g, count, 4) for g in range(4)] if count >= 8 else [torch.arange(count)]
        expected, means, variances = torch.empty_like(images), [], []
        for places in parts:
            values = images[places].transpose(0, 1).flatten(1)
            means.append(values.mean(1)), variances.append(values.var(1))
            inverse = (values.var(1, unbiased=False) + 1e-5).rsqrt().view(1, 3, 1, 1)
            expected[places] = (images[places] - values.mean(1).view(1, 3, 1, 1)) * inverse
        mean = 0.9 * mean + 0.1 * torch.stack(means).mean(0)
        variance = 0.9 * variance + 0.1 * torch.stack(variances).mean(0)
        groups.images = count
        own = torch.arange(world.rank, count, world.size)
        if len(parts) > 1:
            original, distributed.all_reduce = distributed.all_reduce, None  # a collective would be an error
            try:
                output = model(images[own])
            finally:
                distributed.all_reduce = original
        else:
            output = model(images[own])
        differences += (output - expected[own]).abs().flatten().tolist()
    runtime.average_over_ranks(running_statistics(model))
    differences += (model[0].running_mean - mean).abs().tolist() + (model[0].running_var - variance).abs().tolist()
    return max(differences), int(model[0].num_batches_tracked)


def trainer_of(runtime, *assignments):
    dataset = make_dataset(num_train=72, num_test=10)
    settings = ("stem=small", "global_batch_size=16", "validation_size=8", "epochs=4", "optimizer.learning_rate=0.05")
    recipe = fit_to_dataset(make_recipe(*settings, *assignments), dataset.sizes, validation_size_was_typed=True)
    plan = make_plan(recipe, world_size=runtime.world.size, sizes=dataset.sizes, device_type="cpu")
    return build_trainer(recipe, plan, dataset, runtime, Observer())


def ending(trainer):
    """How a training ended: (what was raised, epochs and steps done, whether early stopping stopped it)."""
    try:
        for _ in trainer.epochs():
            pass
        how = "ended"
    except (DivergedError, InterruptedRun) as error:
        how = f"{type(error).__name__}: {error}"
    state = trainer.state
    return how, state.epoch, state.step, state.early_stopping.stopped


STOPPING = "early_stopping={enabled: true, monitor: val_loss, patience: 1, min_delta: 0}"


def metrics_that_disagree(runtime):
    """Each rank computes a validation loss of its own: improving on rank 0, growing on the others."""
    trainer = trainer_of(runtime, STOPPING)
    rank, told = runtime.world.rank, []

    def validate():
        told.append(1)
        return SimpleNamespace(loss=1 / len(told) if rank == 0 else float(len(told)), top1=0.5)

    trainer._validate = validate
    return ending(trainer)


def one_vote(runtime):
    """Only the last rank's patience runs out, after the second epoch."""
    trainer = trainer_of(runtime, STOPPING)
    stopping, epochs = trainer.state.early_stopping, []

    def update(record):
        epochs.append(1)
        return runtime.world.rank == runtime.world.size - 1 and len(epochs) == 2

    stopping.update = update
    return ending(trainer)


def one_divergence(runtime):
    """The loss of the last rank alone is not a number, in step 2."""
    trainer = trainer_of(runtime)
    add = trainer.state.sums.add

    def bad(loss, logits, labels):
        broken = runtime.world.rank == runtime.world.size - 1 and trainer.state.step == 1
        add(loss * math.nan if broken else loss, logits, labels)

    trainer.state.sums.add = bad
    return ending(trainer)


def one_interruption(runtime):
    """A signal reaches the last rank alone, in step 7; ranks look at each other every second step."""
    trainer = trainer_of(runtime)
    object.__setattr__(trainer.plan, "report_every_steps", 2)
    end = trainer._end_step

    def signalled():
        if trainer.state.step == 6 and runtime.world.rank == runtime.world.size - 1:
            trainer.interrupt.requested = "SIGTERM"
        end()

    trainer._end_step = signalled
    return ending(trainer)


def interrupted(runtime, *, folder):
    """A run with ghost groups that is interrupted in the middle of an epoch, beside one that only saves there."""
    dataset, ends = make_dataset(num_train=72, num_test=10), []
    for name, stop in (("whole", None), ("parts", 6)):
        directory = (RunDirectory if runtime.is_main else UnwrittenRun)(folder / name)
        for start_again in (False, True) if stop else (False,):
            trainer = trainer_of(runtime, "batch_norm_group_size=4", "ema_decay=0.9", "selection=last")
            object.__setattr__(trainer.plan, "report_every_steps", 2)
            writer = CheckpointWriter(
                directory, {"dataset": {"fingerprint": "x"}}, checkpoint_every_steps=None if stop else 3
            )
            session = Session(writer, trainer, dataset)
            if start_again:
                session.restore(load_checkpoint(directory.last))
            elif stop:
                end = trainer._end_step

                def signalled(*, trainer=trainer, end=end, stop=stop):
                    end()
                    if trainer.state.step == stop:
                        trainer.interrupt.requested = "SIGTERM"

                trainer._end_step = signalled
            session.begin({})
            with suppress(InterruptedRun):
                session.train()
            assert trainer.state.step == (6 if stop and not start_again else 16)
            runtime.ranks.exchange([])  # the others read what rank 0 has written
        state = trainer.state
        weights = {**state.model.state_dict(), **{f"ema.{k}": v for k, v in state.ema.model.state_dict().items()}}
        ends.append({name: value.clone() for name, value in weights.items()})
    losses = [
        [record.train_loss for record in RunDirectory(folder / name).read_records()] for name in ("whole", "parts")
    ]
    return [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])], losses


def precisions(runtime):
    """What ranks make of machines that would choose different precisions, and of equal ones."""
    compute = runtime.compute
    first = _common_precision(replace(compute, precision="bf16" if runtime.is_main else "fp16"), runtime.ranks)
    second = _common_precision(replace(compute, precision="bf16"), runtime.ranks)
    return first.precision, first.notes, second.precision, second.notes


CHECKS = (
    conversation, evaluations, batch_norm, metrics_that_disagree, one_vote, one_divergence, one_interruption,
)  # fmt: skip


@pytest.fixture(scope="module", params=[2, 3])
def world(request, tmp_path_factory):
    """What each check gave in a world of so many ranks."""
    stopped = functools.partial(interrupted, folder=tmp_path_factory.mktemp("runs"))
    # Three ranks have no whole groups of four; 16 images do not divide by three.
    checks = [*CHECKS, ghost_batch_norm, precisions, stopped] if request.param == 2 else CHECKS[:3]
    results = run_world(request.param, *checks)
    names = [getattr(check, "func", check).__name__ for check in checks]
    return request.param, dict(zip(names, results, strict=True))


def test_ranks_hear_each_other(world):
    size, results = world
    for rank, told in enumerate(results["conversation"]):
        assert told["exchange"] == [(float(each), math.inf) for each in range(size)]
        assert told["from main"] == {"rank": 0}
        assert told["makers"] == ([0] if rank == 0 else []), "what only one may do was done by another"
        assert told["in turn"] == rank
        assert told["nothing"] == "none"


def test_a_failure_ends_all_with_one_reason(world):
    size, results = world
    for rank, told in enumerate(results["conversation"]):
        assert told["mistake of main"] == (SharedError.__name__, "no such file")
        assert told["while loading"] == (SharedError.__name__, "md5")
        assert told["mistake of the last"] == (SharedError.__name__, "not here")
        assert told["mistakes of all"] == (SharedError.__name__, "from 0")
        own = ("KeyError", "'x'") if rank == 0 else (PeerFailedError.__name__, "rank 0 failed")
        assert told["accident of main"] == own
        last = ("OSError", "full") if rank == size - 1 else (PeerFailedError.__name__, f"rank {size - 1} failed")
        assert told["accident of the last"] == last


def test_each_sample_is_evaluated_once(world, runtime):
    alone = evaluations(runtime)
    for result in world[1]["evaluations"]:
        for count, (num_samples, in_matrix, top1, loss, logits) in result.items():
            assert num_samples == in_matrix == count
            assert top1 == alone[count][2]
            assert loss == pytest.approx(alone[count][3], rel=1e-6)
            assert logits == pytest.approx(alone[count][4], rel=1e-4, abs=1e-3)


def test_our_batch_norm_is_torchs_on_the_whole_batch(world):
    assert max(world[1]["batch_norm"]) < 1e-10


def only_two(world):
    size, results = world
    if size != 2:
        pytest.skip("checked in a world of two")
    return results


def test_ghost_groups_are_torchs_batch_norm_of_each(world, runtime):
    alone = ghost_batch_norm(runtime)
    for result in (alone, *only_two(world)["ghost_batch_norm"]):
        assert result[0] < 1e-10
        assert result[1] == 4


def test_ranks_that_disagree_stop_together(world):
    results = only_two(world)
    # Rank 0's metrics count for all: they improve, so nobody stops.
    assert set(results["metrics_that_disagree"]) == {("ended", 4, 16, False)}
    assert set(results["one_vote"]) == {("ended", 2, 8, True)}


def test_divergence_and_interruption_are_agreed(world):
    results = only_two(world)
    message = "DivergedError: the loss is not finite in epoch 1, step 2, at learning rate 0.05"
    (how, epoch, step, stopped), *others = results["one_divergence"]
    assert (how, epoch, stopped) == (message, 0, False)
    assert set(others) == {(how, epoch, step, stopped)}
    assert set(results["one_interruption"]) == {("InterruptedRun: ", 1, 8, False)}


def test_an_interrupted_run_with_ghost_groups_ends_with_the_same_bits(world):
    for different, (whole, parts) in only_two(world)["interrupted"]:
        assert different == []
        assert whole == parts
        assert len(whole) == 4


def test_ranks_have_one_precision(world):
    note = ("the processes could not all serve one precision (bf16, fp16): using no",)
    assert only_two(world)["precisions"] == [("no", note, "bf16", ())] * 2
