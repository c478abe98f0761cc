"""How a run is told to stop."""

import signal

import pytest

from cifar_dist.runtime.interrupt import Interrupt, StoppedBeforeTraining, UntilTraining

NAMES = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"]


@pytest.fixture(autouse=True)
def nothing_is_ignored():
    """As a shell starts a program in front of a person; in the background, or under nohup, some are ignored."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in NAMES}
    for name in NAMES:
        signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


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
    with pytest.raises(StoppedBeforeTraining), UntilTraining():
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), UntilTraining():
        signal.raise_signal(signal.SIGINT)


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGUSR1)
            assert interrupt.requested is None
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_systems_that_lack_a_signal_do_without(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
    assert interrupt.requested == "SIGTERM"


def test_when_all_is_saved_signals_are_ignored_to_the_end():
    """Slurm ends the other processes as soon as one of them has left."""
    with UntilTraining():
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGUSR2)
            interrupt.ignore()
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert interrupt.requested == "SIGUSR2"
