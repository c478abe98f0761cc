"""The first loss that is shown after a resume in the middle of an epoch."""

from dataclasses import replace

import pytest

from cifar_dist.training import setup
from tests.unit.test_engine import Listener, trainer_for
from tests.unit.test_model import narrow_resnet


def test_the_first_loss_after_a_resume_is_that_of_the_steps_since(runtime, monkeypatch):
    monkeypatch.setattr(setup, "build_resnet", narrow_resnet)
    listener = Listener()
    trainer = trainer_for(runtime, observer=listener)
    trainer.plan = replace(trainer.plan, report_every_steps=3)
    steps = trainer.steps(1)
    assert [next(steps), next(steps)] == [1, 2]
    before, *_ = trainer.state.sums.read()
    assert list(trainer.steps(1)) == [3], "goes on in the epoch, as a resumed run does"
    after, *_ = trainer.state.sums.read()
    assert [event[2] for event in listener.events[1:]] == [None, pytest.approx((after - before) / 32, rel=1e-5)]
