"""Two ranks communicate, decide, count and train as one process does: one world, then the command line in others."""

import copy
import functools
import json
import math
import os
import re
import signal
import socket
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn

from cifar_dist.config.errors import PeerFailedError, SharedError, UserError
from cifar_dist.config.plan import fit_to_dataset, make_plan
from cifar_dist.data.dataset import Dataset, LabelledImages
from cifar_dist.model.layers import (
    GroupedBatchNorm,
    Groups,
    running_statistics,
    share_statistics,
    use_groups,
)
from cifar_dist.run.results import Observer
from cifar_dist.runtime.distributed import _check_one_precision
from cifar_dist.training import trainer as trainer_module
from cifar_dist.training.evaluation import EvaluationSet
from cifar_dist.training.measure import measure_pace
from cifar_dist.training.setup import build_trainer
from cifar_dist.training.step import TrainingStep
from cifar_dist.training.trainer import DivergedError, InterruptedRun
from tests.conftest import make_dataset, make_images, make_recipe
from tests.worlds.harness import models_in_float64, run_ranks, run_world, thin_models

SHARES = {2: [[0, 1, 2, 3], [4, 5, 6]], 3: [[0, 1, 2, 3], [], [4, 5, 6]]}


def conversation(runtime):
    """Communicate in every way; return the results and the error of each failure."""
    ranks, rank, size, makers = runtime.ranks, runtime.world.rank, runtime.world.size, []

    def fail(error):
        raise error

    def outcome(action):
        try:
            action()
        except Exception as error:
            return type(error), str(error)
        return None

    def together(failing):
        with ranks.together():
            if rank in failing:
                raise failing[rank]

    return {
        "exchange": ranks.all_gather([rank, math.inf]),
        "from main": ranks.broadcast_from_main(lambda: makers.append(rank) or {"rank": rank}),
        "makers": makers,
        "in turn": ranks.main_process_first(lambda: rank),
        "mistake of main": outcome(lambda: ranks.broadcast_from_main(lambda: fail(UserError("no such file")))),
        "accident of main": outcome(lambda: ranks.broadcast_from_main(lambda: fail(KeyError("x")))),
        "mistake of the last": outcome(lambda: together({size - 1: UserError("not here")})),
        "accident of the last": outcome(lambda: together({size - 1: OSError("full")})),
        "mistakes of all": outcome(lambda: together({r: UserError(f"from {r}") for r in range(size)})),
        "while loading": outcome(
            lambda: ranks.main_process_first(lambda: fail(UserError("md5")) if rank == 0 else None)
        ),
        "nothing": outcome(lambda: together({})),
    }


def evaluations(runtime):
    """Metrics and summed logits for 1, 7 and 10,001 samples."""
    torch.manual_seed(3)
    model, results = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10)), {}
    for number in (1, 7, 10_001):
        generator = torch.Generator().manual_seed(number)
        images = torch.randint(256, (number, 3, 32, 32), generator=generator, dtype=torch.uint8)
        data = LabelledImages(images=images, labels=torch.randint(10, (number,), generator=generator))
        held_out = EvaluationSet(
            data=data, indices=torch.arange(number), class_names=tuple("abcdefghij"), recipe=make_recipe(),
            runtime=runtime,
        )  # fmt: skip
        logits = held_out.predict(model, Observer())
        result = held_out.summarize(logits)
        sums = [result.loss, *logits.sum(0).tolist()]
        results[number] = (result.num_samples, sum(map(sum, result.confusion_matrix)), result.top1, sums)
    return results


NORMS = (
    (nn.BatchNorm2d(5), (7, 5, 6, 4), torch.contiguous_format),
    (nn.BatchNorm2d(5), (7, 5, 6, 4), torch.channels_last),
    (nn.BatchNorm1d(5), (7, 5), torch.contiguous_format),
    (nn.BatchNorm1d(5, affine=False), (7, 5, 3), torch.contiguous_format),
    (nn.BatchNorm3d(5), (7, 5, 2, 3, 2), torch.channels_last_3d),
)


def batch_norm(runtime):
    """The largest difference between our layer on shares and torch's on the whole batch; one collective a pass."""
    own, differences = SHARES[runtime.world.size][runtime.world.rank], []
    generator = torch.Generator().manual_seed(1)
    for layer, shape, layout in NORMS:
        theirs = copy.deepcopy(layer).double()
        images, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 2 for _ in range(2))
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, generator=generator)
        model = share_statistics(nn.Sequential(copy.deepcopy(theirs)), num_ranks=runtime.world.size)
        assert isinstance(model[0], GroupedBatchNorm)
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
            for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
                distributed.all_reduce(ours.grad)
                differences.append(ours.grad - other.grad)
            differences += [output - expected[own], part.grad - whole.grad[own]]
            differences += [model[0].running_mean - theirs.running_mean, model[0].running_var - theirs.running_var]
            model.zero_grad()
            theirs.zero_grad()
            images += 1
        output = copy.deepcopy(model).float()(images[own].bfloat16())  # as under autocast
        torch.testing.assert_close(output.double(), copy.deepcopy(theirs)(images)[own], atol=0.05, rtol=0.05)
        model.eval(), theirs.eval()
        differences.append(model(images[own]) - theirs(images[own]))
    return float(torch.cat([each.detach().abs().flatten() for each in differences]).max())


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
    """Groups of 12, of 11 (uneven), of 5 (too few: one group) and of 8 images, against each group's own moments."""
    world, differences = runtime.world, []
    generator = torch.Generator().manual_seed(2)
    groups = Groups(count=4, num_ranks=world.size)
    model = use_groups(nn.Sequential(nn.BatchNorm2d(3, dtype=torch.float64)), groups)
    assert isinstance(model[0], GroupedBatchNorm)
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for number in (12, 11, 5, 8):
        images = torch.randn(number, 3, 4, 4, generator=generator, dtype=torch.float64)
        parts = [torch.arange(g, number, 4) for g in range(4)] if number >= 8 else [torch.arange(number)]
        expected, means, variances = torch.empty_like(images), [], []
        for places in parts:
            values = images[places].transpose(0, 1).flatten(1)
            means.append(values.mean(1)), variances.append(values.var(1))
            inverse = (values.var(1, unbiased=False) + 1e-5).rsqrt().view(1, 3, 1, 1)
            expected[places] = (images[places] - values.mean(1).view(1, 3, 1, 1)) * inverse
        mean = 0.9 * mean + 0.1 * torch.stack(means).mean(0)
        variance = 0.9 * variance + 0.1 * torch.stack(variances).mean(0)
        groups.images = number
        own = torch.arange(world.rank, number, world.size)
        with all_reduces() as calls:
            differences += (model(images[own]) - expected[own]).abs().flatten().tolist()
        assert len(calls) == (number == 5 and world.size > 1), "groups that lie whole on a rank need no collective"
    runtime.average_over_ranks(running_statistics(model))
    differences += (model[0].running_mean - mean).abs().tolist() + (model[0].running_var - variance).abs().tolist()
    return max(differences), int(model[0].num_batches_tracked)


def precisions(runtime):
    """Return the refusal of ranks that chose different precisions, and of equal ones; None if there is none."""
    refusals = []
    for others in ("fp16", "bf16"):
        try:
            refusals.append(_check_one_precision("bf16" if runtime.is_main else others, runtime.ranks))
        except SharedError as error:
            refusals.append(str(error))
    return refusals


def make_trainer(runtime, *assignments, num_train=72, base="original"):
    """A trainer of a network with a quarter of ResNet-18's channels."""
    dataset = make_dataset(num_train=num_train, num_test=10)
    recipe = fit_to_dataset(make_recipe(*assignments, base=base), dataset.sizes)
    plan = make_plan(recipe, world_size=runtime.world.size, sizes=dataset.sizes, device_type="cpu")
    with thin_models():
        return build_trainer(recipe, plan, dataset, runtime, Observer())


def weights_of(trainer):
    """All weights and buffers, and their average's where there is one."""
    state = trainer.state
    average = {} if state.ema is None else state.ema.model.state_dict()
    return {**state.model.state_dict(), **{f"ema.{name}": value for name, value in average.items()}}


def default_recipe(runtime):
    """The weights after two epochs of four steps by what the default recipe has, in float64, and what each step saw."""
    # 24 pixels: of 16 BatchNorm would see 2 or 3 values, and a change of 1e-15 grow to 1e-10 in nine steps. The last
    # batch has 3 images, of which the ranks have 2 and 1.
    with models_in_float64():
        trainer = make_trainer(
            runtime, "stem=small", "epochs=2", "global_batch_size=8", "validation_size=4",
            "image_size_schedule=[[0.75, 0.5], [1.0, 1.0]]", num_train=31, base="standard",
        )  # fmt: skip
    seen, train_on = [], trainer.step.train_on

    def watched(batch, **named):
        seen.append((trainer.state.epoch, batch.samples.tolist()))
        train_on(batch, **named)

    trainer.step.train_on = watched
    losses = [record.train_loss for record in trainer.fit()]
    return {name: value.tolist() for name, value in weights_of(trainer).items()}, losses, seen


def pace(runtime):
    """How fast a recipe is measured to train; the ranks must do equally many steps, and agree."""
    recipe = make_recipe("global_batch_size=8", "image_size_schedule=[[0.5, 0.5], [1.0, 1.0]]")
    with thin_models():
        measured = measure_pace(recipe, runtime, image_size=32, num_classes=10, seconds=0.2)
    return [*measured.step_seconds.values(), measured.evaluation_seconds]


def ending(trainer):
    """How a training ended: what was raised, epochs and steps done, whether early stopping stopped it."""
    try:
        trainer.fit()
        how = "ended"
    except (DivergedError, InterruptedRun) as error:
        how = f"{type(error).__name__}: {error}"
    return how, trainer.state.epoch, trainer.state.step, trainer.state.early_stopping.stopped


def short_trainer(runtime, *assignments):
    """A trainer of four epochs of four steps."""
    settings = ("stem=small", "image_size=16", "global_batch_size=16", "validation_size=8", "epochs=4")
    return make_trainer(runtime, *settings, "optimizer.learning_rate=0.05", *assignments)


STOPPING = "early_stopping={enabled: true, monitor: val_loss, patience: 1, min_delta: 0}"


def metrics_that_disagree(runtime):
    """Each rank computes a validation loss of its own: improving on rank 0, growing on the others."""
    trainer, calls = short_trainer(runtime, STOPPING), []

    def validate():
        calls.append(1)
        return SimpleNamespace(loss=1 / len(calls) if runtime.is_main else float(len(calls)), top1=0.5)

    trainer._validate = validate
    return ending(trainer)


def one_vote(runtime):
    """Only the last rank's patience ends, after the second epoch."""
    trainer, epochs = short_trainer(runtime, STOPPING), []

    def update(record):
        epochs.append(1)
        return runtime.world.rank == runtime.world.size - 1 and len(epochs) == 2

    trainer.state.early_stopping.update = update
    return ending(trainer)


def one_divergence(runtime):
    """The loss of the last rank alone is not a number, in step 2."""
    trainer = short_trainer(runtime)
    add = trainer.state.sums.add

    def bad(loss, logits, labels):
        broken = runtime.world.rank == runtime.world.size - 1 and trainer.state.step == 1
        add(loss * math.nan if broken else loss, logits, labels)

    trainer.state.sums.add = bad
    return ending(trainer)


def one_interruption(runtime):
    """A signal reaches the last rank alone, in step 7; ranks look at each other every second step."""
    trainer = short_trainer(runtime)
    object.__setattr__(trainer.plan, "agree_every_steps", 2)
    trainer_module._AGREE_SECONDS = 1e9  # not more often on a busy machine
    end = trainer._end_step

    def signalled(epoch):
        if trainer.state.step == 6 and runtime.world.rank == runtime.world.size - 1:
            trainer.interrupt.requested = "SIGTERM"
        end(epoch)

    trainer._end_step = signalled
    return ending(trainer)


@pytest.fixture(scope="module")
def world():
    """Run the checks on two ranks; return their results by name and rank."""
    checks = (
        conversation, evaluations, batch_norm, ghost_batch_norm, precisions, default_recipe,
        pace, metrics_that_disagree, one_vote, one_divergence, one_interruption,
    )  # fmt: skip
    return dict(zip([check.__name__ for check in checks], run_world(2, *checks), strict=True))


def assert_conversation(results):
    """Values reach all ranks, and a failure ends all of them with one reason."""
    size = len(results)
    for rank, told in enumerate(results):
        assert told["exchange"] == [(float(each), math.inf) for each in range(size)]
        assert (told["from main"], told["in turn"], told["nothing"]) == ({"rank": 0}, rank, None)
        assert told["makers"] == ([0] if rank == 0 else []), "what only one may do was done by another"
        assert told["mistake of main"] == (SharedError, "no such file")
        assert told["while loading"] == (SharedError, "md5")
        assert told["mistake of the last"] == (SharedError, "not here")
        assert told["mistakes of all"] == (SharedError, "from 0")
        own = (KeyError, "'x'") if rank == 0 else (PeerFailedError, "rank 0 failed")
        assert told["accident of main"] == own
        last = (OSError, "full") if rank == size - 1 else (PeerFailedError, f"rank {size - 1} failed")
        assert told["accident of the last"] == last


def assert_evaluated_once(results, alone):
    """Each sample counts once, as in a world of one."""
    for result in results:
        for number, (num_samples, in_matrix, top1, sums) in result.items():
            assert num_samples == in_matrix == number
            assert top1 == alone[number][2]
            assert sums == pytest.approx(alone[number][3], rel=1e-4, abs=1e-3)


@pytest.mark.full
def test_three_ranks_of_which_one_may_have_no_images(runtime):
    told, evaluated, differences = run_world(3, conversation, evaluations, batch_norm)
    assert_conversation(told)
    assert_evaluated_once(evaluated, evaluations(runtime))
    assert max(differences) < 1e-10


def test_ranks_communicate_and_fail_together(world):
    assert_conversation(world["conversation"])


def test_the_ranks_agree_on_their_pace(world):
    first, second = world["pace"]
    assert first == second and min(first) > 0


def test_each_sample_is_evaluated_once(world, runtime):
    assert_evaluated_once(world["evaluations"], evaluations(runtime))


def test_our_batch_norm_is_torchs_on_the_whole_batch(world):
    assert max(world["batch_norm"]) < 1e-10


def test_ghost_groups_are_normalized_by_their_own_moments(world, runtime):
    for difference, num_batches in (ghost_batch_norm(runtime), *world["ghost_batch_norm"]):
        assert difference < 1e-10
        assert num_batches == 4


def test_ranks_have_one_precision(world):
    refusal = "the processes chose different precisions (bf16, fp16): type --precision no"
    assert world["precisions"] == [[refusal, None]] * 2


def test_the_default_recipe_trains_the_same_weights_as_one_process(world, runtime):
    alone, alone_losses, alone_seen = default_recipe(runtime)
    (first, losses, seen), (second, other_losses, other_seen) = world["default_recipe"]
    assert (first, losses) == (second, other_losses), "the ranks' weights or records differ"
    for name, value in alone.items():
        ours, theirs = torch.tensor(first[name], dtype=torch.float64), torch.tensor(value, dtype=torch.float64)
        assert float((ours - theirs).norm()) <= 1e-8 * float(theirs.norm()), name
    assert losses == pytest.approx(alone_losses, rel=1e-6)  # their sums are float32
    both = [(epoch, sorted(own + other)) for (epoch, own), (_, other) in zip(seen, other_seen, strict=True)]
    assert both == [(epoch, sorted(samples)) for epoch, samples in alone_seen]


def test_ranks_that_disagree_stop_together(world):
    # Rank 0's metrics count for all: they improve, so no rank stops.
    assert set(world["metrics_that_disagree"]) == {("ended", 4, 16, False)}
    assert set(world["one_vote"]) == {("ended", 2, 8, True)}


def test_divergence_and_interruption_are_agreed(world):
    message = "DivergedError: the loss is not finite in epoch 1, step 2, at learning rate 0.05"
    (how, epoch, step, stopped), *others = world["one_divergence"]
    assert (how, epoch, stopped) == (message, 0, False)
    assert set(others) == {(how, epoch, step, stopped)}
    assert set(world["one_interruption"]) == {("InterruptedRun: ", 1, 8, False)}


QUICK = [
    "--recipe", "original", "--dataset", "images", "--run-dir", "run", "--epochs", "1", "--config",
    str(Path(__file__).parents[2] / "accelerate_configs" / "cpu.yaml"),
    "--set", "global_batch_size=8", "stem=small", "image_size=16", "early_stopping.enabled=false",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    make_images(tmp_path / "images")
    return tmp_path


def slurm_task(job_id: int, rank: int) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0",
        "SLURM_STEP_ID": "0", "SLURM_JOB_ID": str(job_id), "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost,nowhere", "SLURM_CPUS_PER_TASK": "1",
    }  # fmt: skip


def is_free(port: int) -> bool:
    with socket.socket() as server:
        try:
            server.bind(("", port))
        except OSError:
            return False
        return True


def count_writers() -> None:
    """Write a line for each checkpoint that this process writes."""
    from cifar_dist.run import prepare

    save = prepare.save_checkpoint

    def counted(path, *arguments, **named):
        with Path("writers").open("a") as file:
            file.write(f"{os.environ['SLURM_PROCID']}\n")
        save(path, *arguments, **named)

    prepare.save_checkpoint = counted


def test_slurm_tasks_train_in_one_world_and_rank_0_writes_and_prints(folder):
    job_id = next(job_id for job_id in count(os.getpid()) if is_free(12_000 + job_id * 31 % 20_000))
    tasks = run_ranks(2, QUICK, folder, prepare=count_writers, launcher=functools.partial(slurm_task, job_id))
    assert [code for code, _, _ in tasks] == [0, 0], tasks
    summary = json.loads((folder / "run" / "summary.json").read_text())
    found = tuple(summary[name] for name in ("status", "world_size", "epochs", "device", "num_threads"))
    assert found == ("completed", 2, 1, "cpu", 1)
    assert summary["test"]["num_samples"] == sum(map(sum, summary["test"]["confusion_matrix"])) == 7
    record = json.loads((folder / "run" / "metrics.jsonl").read_text())
    assert (record["step"], record["world_size"]) == (4, 2)
    assert "4 per device x 2 processes" in tasks[0][1]
    assert "Training completed after 1 of 1 epoch" in tasks[0][1]
    assert tasks[1][1] == "", "another rank than 0 prints"
    assert (folder / "writers").read_text() == "0\n", "checkpoints were written by these ranks"
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["last.pt"]


def other_data() -> None:
    if os.environ["RANK"] == "1":
        Dataset.fingerprint = lambda dataset: "another"


def test_data_that_differs_between_ranks_is_refused_with_code_2(folder):
    ranks = run_ranks(2, QUICK, folder, prepare=other_data, CIFAR_DIST_LAUNCHED="1")  # no rank waits for another
    (code, _, err), (other_code, _, other_err) = ranks
    assert (code, other_code, other_err) == (2, 2, "")
    assert err.startswith("error: ") and " is not the same on " in err
    assert err.count("\n") == 1
    assert not (folder / "run").exists()


def full_disk() -> None:
    if os.environ["RANK"] == "0":
        fsync = os.fsync

        def full(descriptor):
            if Path("run/metrics.jsonl").exists() and Path("run/metrics.jsonl").stat().st_size:
                raise OSError(28, "No space left on device")
            fsync(descriptor)

        os.fsync = full


def test_a_rank_that_fails_ends_the_others_which_are_in_a_collective(folder):
    argv = [*QUICK, "--epochs", "100000"]
    (code, _, err), (other_code, _, other_err) = run_ranks(2, argv, folder, prepare=full_disk)
    assert (code, other_code) == (1, 1)
    assert "No space left on device" in err
    assert other_err.startswith("rank 1 ends: another process is gone")


def die_as_rank_1() -> None:
    if os.environ["RANK"] == "1":
        TrainingStep.train_on = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def test_rank_0_says_how_to_resume_when_another_is_killed(folder):
    (code, _, err), _ = run_ranks(2, QUICK, folder, prepare=die_as_rank_1)
    assert code == 1
    found = re.fullmatch(r"rank 0 ends: another process is gone \((.+)\); resume with: .+ --resume run\n", err)
    assert found and "gloo" not in found[1], err
