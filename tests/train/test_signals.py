"""One signal asks, the second one acts."""

import signal
import threading

import pytest

from kimi_jax.train.signals import catch_stop_signals


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
