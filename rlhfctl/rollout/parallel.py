"""Several requests at a time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
T = TypeVar("T")


def in_parallel(items: Sequence[Item], act: Callable[[Item], T], most: int) -> list[T]:
    """act of each item, in order, `most` at a time. Where one raises, those that have not begun never do."""
    if not items:
        return []
    with ThreadPoolExecutor(min(len(items), most)) as threads:
        futures = [threads.submit(act, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise
