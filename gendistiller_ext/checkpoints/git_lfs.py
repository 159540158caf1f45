"""Tells a Git LFS pointer, the few lines of text that lie where weights should after a clone without Git LFS.

Its first line: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""
from __future__ import annotations

import re
from typing import Optional

FIRST_LINE = b"version https://git-lfs.github.com/spec/"
LONGEST = 200  # bytes of a pointer that are looked at


def pointer(start: bytes) -> Optional[str]:
    """What is wrong, and what to do, where the first LONGEST bytes of a file are a pointer's; else None."""
    if not start.startswith(FIRST_LINE):
        return None
    size = re.search(rb"\nsize (\d{1,18})\n", start[:LONGEST])
    return (f"expected the file itself, got a Git LFS pointer{f' to its {int(size[1]):,} bytes' if size else ''}: "
            "run `git lfs pull` in the folder that was cloned")
