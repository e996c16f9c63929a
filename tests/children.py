"""Functions run in forked processes, which spares importing torch again: as another user, or to be killed."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import Any

NOBODY = 65534


def in_child(function: Callable[[], Any], *, as_nobody: bool = False, **variables: str) -> Any:
    """What `function` returns in a process of its own, which has only HOME, PATH and `variables` in its environment.

    An exception there is an `AssertionError` here, with its traceback. `as_nobody` drops the rights of root, if there
    are any.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            keep = {name: os.environ[name] for name in ("HOME", "PATH")}
            os.environ.clear()
            os.environ.update({**keep, **variables})
            if as_nobody and os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            answer = (True, function())
        except BaseException:
            answer = (False, traceback.format_exc())
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(answer, pipe)
        sys.stdout.flush()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        sent = pipe.read()
    os.waitpid(child, 0)
    assert sent, "the process ended early"
    fine, value = pickle.loads(sent)
    assert fine, value
    return value
