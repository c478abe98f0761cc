"""Signals that stop a run."""

import signal

import pytest

from cifar_dist.runtime.signals import Interrupt, InterruptBeforeTraining, StoppedBeforeTraining

NAMES = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"]


@pytest.fixture(autouse=True)
def nothing_is_ignored():
    """As a shell starts a program in front of a person; in the background, or under nohup, some are ignored."""
    numbers = [getattr(signal, name) for name in NAMES]
    default = dict.fromkeys(numbers, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in default.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_is_noted_and_the_handlers_are_put_back(name):
    before = signal.getsignal(getattr(signal, name))
    with Interrupt() as interrupt:
        assert interrupt.requested is None
        signal.raise_signal(getattr(signal, name))
        assert interrupt.requested == name
    assert signal.getsignal(getattr(signal, name)) is before


def test_a_second_ctrl_c_ends_it_and_a_second_sigterm_does_not():
    with Interrupt() as interrupt:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert interrupt.requested == "SIGTERM"
    with pytest.raises(KeyboardInterrupt), Interrupt():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            signal.raise_signal(number)


def test_before_training_a_signal_ends_it():
    with pytest.raises(StoppedBeforeTraining), InterruptBeforeTraining():
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), InterruptBeforeTraining():
        signal.raise_signal(signal.SIGINT)


def test_an_ignored_signal_stays_ignored_and_a_missing_one_is_skipped(monkeypatch):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    monkeypatch.delattr(signal, "SIGUSR2")
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGUSR1)
        assert interrupt.requested is None
        signal.raise_signal(signal.SIGTERM)
    assert interrupt.requested == "SIGTERM"


def test_when_all_is_saved_signals_are_ignored_to_the_end():
    """Slurm ends the other processes as soon as one of them has left."""
    with InterruptBeforeTraining():
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGUSR2)
            interrupt.ignore()
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert interrupt.requested == "SIGUSR2"
