"""Signals that ask a run to end: it finishes its step and saves."""

import contextlib
import signal
import sys
import threading


@contextlib.contextmanager
def stopping(learner):
    """Let Ctrl-C, SIGTERM and a closed terminal finish the step; a second signal interrupts at
    once, but not one of many ranks: torchrun passes on what a terminal has sent already, and sends
    SIGTERM to all once one has ended, so they heed signals in this way until they have ended.
    Under nohup, a closed terminal stays ignored."""
    def ask(number, _frame):
        if learner.stop_signal and learner.team.world == 1:
            raise KeyboardInterrupt
        told, learner.stop_signal = learner.stop_signal, number
        if told or not learner.team.first:
            return
        with contextlib.suppress(OSError):  # a terminal that is closed takes no text
            print("\nfinishing the step and saving ..", file=sys.stderr, flush=True)

    handled = threading.current_thread() is threading.main_thread()  # no other thread may
    numbers = [signal.SIGINT, signal.SIGTERM] if handled else []
    hangup = getattr(signal, "SIGHUP", None)
    if handled and hangup and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items() if learner.team.world == 1 else ():
            signal.signal(number, handler)
