"""Three ranks, of which one may have no images, and a run that two ranks interrupt and go on with."""

import functools
from contextlib import suppress

import pytest
import torch

from cifar_dist.run.directory import RunDirectory
from cifar_dist.training.trainer import InterruptedRun
from tests.runs import begin
from tests.worlds.harness import run_world
from tests.worlds.test_two_ranks import (
    assert_conversation,
    assert_evaluated_once,
    batch_norm,
    conversation,
    evaluations,
    short_trainer,
    weights_of,
)

pytestmark = pytest.mark.full


def test_three_ranks(runtime):
    """What two ranks do in the fast tier."""
    told, evaluated, differences = run_world(3, conversation, evaluations, batch_norm)
    assert_conversation(told)
    assert_evaluated_once(evaluated, evaluations(runtime))
    assert max(differences) < 1e-10


def interrupted(runtime, *, folder):
    """A run with ghost groups that is interrupted in the middle of an epoch, beside one that only saves there."""
    ends = []
    for name, stops in (("whole", [None]), ("parts", [6, None])):
        for stop in stops:
            trainer = short_trainer(runtime, "batch_norm_group_size=4", "ema_decay=0.9", "selection=last")
            object.__setattr__(trainer.plan, "report_every_steps", 2)
            every = 3 if name == "whole" else None
            end = trainer._end_step

            def signalled(epoch, *, trainer=trainer, end=end, stop=stop):
                if trainer.state.step + 1 == stop:
                    trainer.interrupt.requested = "SIGTERM"
                end(epoch)

            trainer._end_step = signalled
            begin(trainer, folder / name, checkpoint_every_steps=every)
            with suppress(InterruptedRun):
                trainer.fit()
                trainer.recorder.save(trainer.state)
            assert trainer.state.step == (stop or 16)
            runtime.ranks.all_gather([0])  # the others read what rank 0 has written
        ends.append({key: value.clone() for key, value in weights_of(trainer).items()})
    losses = [[each.train_loss for each in RunDirectory(folder / name).read_records()] for name in ("whole", "parts")]
    return [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])], losses


def test_an_interrupted_run_with_ghost_groups_ends_with_the_same_bits(tmp_path):
    (results,) = run_world(2, functools.partial(interrupted, folder=tmp_path))
    for different, (whole, parts) in results:
        assert different == []
        assert whole == parts
        assert len(whole) == 4
