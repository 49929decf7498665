"""Python's cycle collector, kept away from what makes many objects and no cycle: imports and rows of data.

It looks through all that is there again and again while both only grow: a sixth of the time of imports, and up to half
of that of reading rows.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def resting() -> Iterator[None]:
    """Inside, nothing is looked through."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
