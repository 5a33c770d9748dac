"""Who may still touch memory that is lent to a thread: its owner, or the thread, never both."""

from __future__ import annotations

import threading


class Handover:
    """Of memory that a thread will use once, when it gets to it. The owner takes it back before, or waits until the
    thread, which does nothing but copy then, has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_begun = False
        self._is_taken_back = False

    def begin(self) -> bool:
        """For the thread: whether it may use the memory now."""
        with self._lock:
            if self._is_taken_back:
                return False
            self._is_begun = True
            return True

    def take_back(self) -> bool:
        """For the owner: whether the thread has not begun, and never will."""
        with self._lock:
            if self._is_begun:
                return False
            self._is_taken_back = True
            return True
