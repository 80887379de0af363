"""What a long run shows, and the signals that end it."""

import math
import signal
import sys
import time
from contextlib import contextmanager

shown_at = -math.inf  # when show_progress last printed


def show_progress(text, last=False):
    """One line that is written over on a terminal; in a log file a line every 10 seconds."""
    global shown_at
    terminal, now = sys.stdout is not None and sys.stdout.isatty(), time.monotonic()
    if last or now - shown_at >= (0.1 if terminal else 10):
        shown_at = now
        start, end = ("\r\x1b[K", "" if not last else "\n") if terminal else ("", "\n")
        print(start + text, end=end, flush=True)


def time_left(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextmanager
def stop_on_signal():
    """The first Ctrl-C or SIGTERM is noted in the list that this yields; the second one acts. One
    that nobody has acted on by the end interrupts then."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt
