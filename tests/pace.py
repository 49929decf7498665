"""Budgets of CPU seconds, held on machines of any speed: beside what is measured runs work that never changes."""

import resource
import subprocess
import sys
from collections.abc import Callable

# What a command line does before it works: starts python, imports from byte code, parses a large file.
WORK = """
import argparse, asyncio, email.message, http.client, json, logging.config, multiprocessing.pool
import sqlite3, unittest.mock, xml.etree.ElementTree
json.loads(json.dumps({str(i): i for i in range(150_000)}))
"""
USUAL = 0.24  # CPU seconds of WORK on the machine whose budgets the tests hold: two EPYC cores with nothing else to do
SLACK = 1.15  # by so much the ratio of two of these least times moves from one try to the next
ROUNDS = 6  # the least of so many: other processes slow a run down, nothing makes it faster


def fixed_work() -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-I", "-c", WORK], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def assert_within(budget: float, measure: Callable[[], float]) -> None:
    """`measure` returns CPU seconds: at most the budget where fixed_work() takes its usual time, else in proportion."""
    spent: list[float] = []
    work: list[float] = []
    for _ in range(ROUNDS):
        spent.append(measure())
        if min(spent) <= budget:
            return
        work.append(fixed_work())
        if min(spent) <= budget * min(work) / USUAL * SLACK:
            return
    raise AssertionError(
        f"{min(spent):.3f} s of a budget of {budget} s, where fixed work took {min(work):.3f} of {USUAL} s"
    )
