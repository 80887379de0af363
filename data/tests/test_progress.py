"""data/lib/progress.py: what a long run shows, and the signals that end it."""

import io
import math
import signal
import sys

import pytest

from data.lib import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still: clock["now"] is its time, in seconds."""
    time = {"now": 1000.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: time["now"])
    monkeypatch.setattr(progress, "shown_at", -math.inf)
    return time


def shown(output, clock, monkeypatch):
    """What is printed if one line is offered every 0.09 seconds, 200 times, and then
    the last one."""
    monkeypatch.setattr(sys, "stdout", output)
    for n in range(200):
        progress.show_progress(f"step {n}")
        clock["now"] += 0.09
    progress.show_progress("step 200", last=True)
    return output.getvalue()


def test_a_terminal_has_one_line_that_is_written_over_ten_times_a_second(
    clock, monkeypatch
):
    text = shown(Terminal(), clock, monkeypatch)
    first, *others = text.split("\r\x1b[K")
    assert first == ""
    assert others == [*(f"step {n}" for n in range(0, 200, 2)), "step 200\n"]


def test_a_file_gets_a_line_every_ten_seconds_and_the_last_one(clock, monkeypatch):
    text = shown(io.StringIO(), clock, monkeypatch)
    assert text == "step 0\nstep 112\nstep 200\n"


def test_progress_without_any_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as `>&-` leaves it
    progress.show_progress("step 1", last=True)


def test_time_left_is_in_hours_minutes_and_seconds():
    times = {0.4: "0:00", 59.4: "0:59", 59.6: "1:00", 3599: "59:59", 36_061: "10:01:01"}
    assert {seconds: progress.time_left(seconds) for seconds in times} == times


SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def handlers():
    """Handlers that note a signal, in place of those that end the process."""
    noted = []

    def note(number, frame):
        noted.append(number)

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    yield noted
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_the_second_acts(number, handlers):
    with pytest.raises(KeyboardInterrupt), progress.stop_on_signal() as received:
        signal.raise_signal(number)
        assert (received, handlers) == ([number], [])
        signal.raise_signal(number)
        assert (received, handlers) == ([number], [number])


def test_a_signal_that_nobody_acted_on_interrupts_at_the_end(handlers):
    with pytest.raises(KeyboardInterrupt), progress.stop_on_signal():
        signal.raise_signal(signal.SIGTERM)

    stopped = pytest.raises(progress.TrainingStopped, match="acted on")
    with stopped, progress.stop_on_signal():
        signal.raise_signal(signal.SIGTERM)
        raise progress.TrainingStopped("acted on")

    with progress.stop_on_signal() as received:
        pass
    assert received == []


def test_afterwards_signals_do_what_they_did_before(handlers):
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), progress.stop_on_signal():
        assert signal.getsignal(signal.SIGINT) not in before
        raise ZeroDivisionError
    with progress.stop_on_signal():
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before
