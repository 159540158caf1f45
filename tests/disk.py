"""A disk that is full."""

from __future__ import annotations

import errno

from gendistiller_ext.atomic import replacing


def full_disk(monkeypatch, after):
    """Every file opened for writing through `replacing` holds at most `after` bytes."""
    original = replacing.__enter__

    def enter(self):
        stream = original(self)
        write = stream.write
        room = [after]

        class Full:
            def write(self, data):
                room[0] -= len(data)
                if room[0] < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(data)

            def __getattr__(self, name):
                return getattr(stream, name)
        return Full()
    monkeypatch.setattr(replacing, "__enter__", enter)
