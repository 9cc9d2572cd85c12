"""One signal asks, the second one acts."""

import gc
import signal
import threading
import time

import pytest

from kimi_jax.train.signals import catch_stop_signals, exit_on_sigterm


@pytest.fixture(autouse=True)
def foreground():
    """A shell has processes that it starts with & ignore Ctrl-C."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_noted(number):
    with catch_stop_signals() as stop:
        assert not stop and stop.exit_code == 0
        signal.raise_signal(number)
        assert stop.signal == number and stop.exit_code == 128 + number


def test_second_signal_has_its_usual_effect():
    with pytest.raises(KeyboardInterrupt), catch_stop_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop
        signal.raise_signal(signal.SIGINT)


def test_an_echo_of_a_signal_is_no_second_one(monkeypatch):
    outlasted = False
    with pytest.raises(KeyboardInterrupt), catch_stop_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        outlasted = bool(stop)
        monkeypatch.setattr("kimi_jax.train.signals.ECHO_S", 0.0)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the handlers of before are not back")
    assert outlasted, "the echo ended it"


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with catch_stop_signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_catch_nothing():
    seen = []

    def body():
        with catch_stop_signals() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [False]


def test_sigterm_unwinds_a_program():
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []
    with pytest.raises(SystemExit) as ended, exit_on_sigterm():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(True)
    assert ended.value.code == 143 and cleaned and signal.getsignal(signal.SIGTERM) == before


def test_sigterm_within_the_garbage_collector_is_not_lost():
    """Python drops what is raised within a callback of the collector."""
    came = []

    def callback(phase, info):
        if phase == "start" and not came:
            came.append(True)
            signal.raise_signal(signal.SIGTERM)
            sum(range(10))  # the handler runs here

    try:
        with pytest.raises(SystemExit) as ended, exit_on_sigterm():
            gc.callbacks.append(callback)  # not before: the collector may start at any moment
            gc.collect()
            came.append("after")
            time.sleep(60)  # the signal comes again
    finally:
        gc.callbacks.remove(callback)
    assert came == [True, "after"] and ended.value.code == 143
