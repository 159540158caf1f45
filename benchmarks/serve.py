"""The other end of process.py: requests from standard input, answers on standard output."""

from __future__ import annotations

import json
import os
import sys
import time


def serve(worker: object) -> None:
    """Answers {"do": METHOD, ...} with what that method of `worker` returns, a dict, or with {"error", "kind"};
    {"do": "cpu"} with the {"seconds"} that this process's threads took so far."""
    # Libraries write on standard output: the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            do = request.pop("do")
            answer = {"seconds": time.process_time()} if do == "cpu" else getattr(worker, do)(**request)
        except Exception as error:
            answer = {"error": " ".join(str(error).split())[:300], "kind": type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
