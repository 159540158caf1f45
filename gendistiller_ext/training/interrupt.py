"""SIGINT and SIGTERM as a wish to stop at the next good place."""
from __future__ import annotations

import signal
import threading
from typing import Optional


class Interrupt:
    """While entered, SIGINT and SIGTERM only set `signal`; a second one acts as usual. Elsewhere than in the
    main thread signals are left alone."""

    def __init__(self):
        self.signal: Optional[int] = None
        self._former: dict = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._catch)
        return self

    def _catch(self, number: int, frame) -> None:
        self.signal = number
        self.__exit__()

    def __exit__(self, *exception) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former = {}
