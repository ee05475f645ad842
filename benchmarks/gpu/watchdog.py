"""A part's processes end with the command that started them, also where that one is killed."""

import os
import signal
import threading


def end_with_parent(pipe: int = 0) -> None:
    """Kill this process and its group as soon as the parent ends, which closes its end of `pipe`.

    A part that outlived a killed command would disturb the figures of the next one, without a limit of time.
    """

    def watch() -> None:
        os.read(pipe, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
