"""What a long run shows, and the signals that end it."""

import math
import signal
import sys
import time
from contextlib import contextmanager

shown_at = -math.inf  # when show_progress last printed


class TrainingStopped(KeyboardInterrupt):
    """A signal asked training to stop; the checkpoint is on disk."""


def show_progress(text, last=False):
    """Shows one line that is written over on a terminal; a file gets a line every ten
    seconds. The last one is shown in any case."""
    global shown_at
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    pause = 0.1 if is_terminal else 10  # seconds

    now = time.monotonic()
    if not last and now - shown_at < pause:
        return
    shown_at = now

    if is_terminal:
        clear = "\r\x1b[K"
        print(clear + text, end="\n" if last else "", flush=True)
    else:
        print(text, flush=True)


def time_left(seconds):
    """Seconds as h:mm:ss, or as m:ss below one hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"


@contextmanager
def stop_on_signal():
    """Notes the first Ctrl-C or SIGTERM in the list that this yields; a second one acts
    as usual. Raises KeyboardInterrupt at the end if nobody has acted on the first."""
    received = []
    previous = {}

    def note(number, frame):
        received.append(number)
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)

    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

    if received:
        raise KeyboardInterrupt
