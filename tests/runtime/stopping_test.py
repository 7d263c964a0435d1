"""SIGTERM and Ctrl-C: noted while there is something to save, and else the end."""

import os
import signal
import time

import pytest

from scalr_jax.runtime import distributed, stopping


@pytest.fixture
def left(monkeypatch):
    """The exit codes that the process would have ended with."""
    codes = []
    monkeypatch.setattr(stopping, "leave", lambda code, _: codes.append(code))
    monkeypatch.setattr(stopping, "PATIENCE", 0.05)
    return codes


def send(*signals):
    for number in signals:
        os.kill(os.getpid(), number)
        time.sleep(0.02)


def test_outside_of_training_sigterm_and_ctrl_c_are_exceptions_that_no_handler_of_errors_takes(left):
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    for number, error in ((signal.SIGTERM, stopping.Preempted), (signal.SIGINT, KeyboardInterrupt)):
        with pytest.raises(error), stopping.heard():
            try:
                send(number)
            except Exception as wrong:
                raise AssertionError from wrong
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    assert stopping.requests() is None
    time.sleep(0.1)
    assert left == []  # what was heard ended well, and in time


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_while_steps_are_made_the_run_is_asked_to_save(number, left):
    with stopping.heard(), distributed.preemption() as reached:
        assert not reached(1)
        send(number)
        assert reached(2)
        time.sleep(0.1)
        assert left == []  # however long the save takes
    with pytest.raises(stopping.Preempted), stopping.heard(), distributed.preemption() as reached:
        send(signal.SIGTERM)  # no step yet: nothing to save


def test_what_is_asked_while_the_last_state_is_saved_stops_what_follows(left):
    with stopping.heard():
        stopping.check()
        with distributed.preemption() as reached:
            reached(1)
            send(signal.SIGTERM)
        with pytest.raises(stopping.Preempted):
            stopping.check()


def test_a_second_ctrl_c_leaves_at_once(left):
    with stopping.heard(), distributed.preemption() as reached:
        reached(1)
        send(signal.SIGINT, signal.SIGINT)
    assert left == [2]


def test_a_process_among_several_tells_the_others_and_leaves_when_no_step_follows(left):
    told = []
    with stopping.heard() as requests:
        requests.tell = lambda: told.append(True)
        send(signal.SIGTERM)
        assert told == [True]
        assert left == []
        time.sleep(0.2)
        assert left == [0]
