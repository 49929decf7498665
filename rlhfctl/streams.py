"""Writing for a person who may have gone: a broken pipe or a closed terminal ends nothing.

What the reader would have read is dropped. All that a command or a run tells on stderr is written through here.
"""

import contextlib
import os
import sys
from typing import TextIO


def write(stream: TextIO | None, text: str) -> bool:
    """Whether it was written. A closed or broken stream is given up for good, so that nothing complains at exit."""
    if stream is None:
        return True
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        give_up(stream)
    except (OSError, ValueError) as error:
        give_up(stream)
        if stream is sys.stdout:
            write(
                sys.stderr,
                f"cannot write the result to stdout: {getattr(error, 'strerror', None) or error}\n",
            )
            return False
    return True


def give_up(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
