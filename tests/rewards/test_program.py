"""Programs that a model writes: right ones run, whatever else they do is an outcome, and nothing gets out."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhfctl.recipe.sections import VerifierSource
from rlhfctl.rewards.outcome import Outcome
from rlhfctl.rewards.program import ProgramAnswer, Programs, program_of
from rlhfctl.rewards.verifiers import VerifierReward

SOURCE = VerifierSource(kind="verifier", name="program_answer", right=1.0, wrong=0.1, unparsable=0.0)


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    found = Programs(cpu_seconds=1, seconds=20)
    yield found
    found.close()


def test_what_the_program_is() -> None:
    assert program_of("    return 3") == "def solution():\n    return 3\n"  # the prompt began it
    assert program_of("Well:\ndef solution():\n    return 3\n\nprint(4)") == "def solution():\n    return 3\n"
    assert program_of("") is None
    assert program_of("x" * 30_000) is None


def test_values(programs: Programs) -> None:
    bodies = {
        "    return 1 / 4\n": 0.25,
        "    a = 3\n    return a * math.sqrt(4)\n": 6.0,
        "    from sympy import symbols, solve\n    x = symbols('x')\n    return solve(2 * x - 6, x)[0]\n": 3.0,
        "    from datetime import date\n    return (date(2024, 3, 1) - date(2024, 2, 1)).days\n": 29.0,
        "    print('x' * 1000)\n    return True\n": 1.0,
        "    return '5'\n": 5.0,
    }
    assert programs.run(list(bodies)) == [(value, "ok") for value in bodies.values()]


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "while True:\n        try:\n            while True: pass\n        except BaseException: pass",
        "x = []\n    while True: x.append(bytearray(10**6))",
        "return len('a' * 10**10)",
        "import sys\n    sys.exit(0)",
        "import os\n    os._exit(0)",
        "return solution()",
        "import sys\n    sys.setrecursionlimit(10**9)\n    return solution()",
        "return 10 ** 400",
        "return '1' * 10**7",
        "return float('nan')",
        "return None",
        "return (",
        "return 1 / 0",
        "import os\n    while True: os.fork()",
        "import threading\n    threading.Thread(target=print).start()\n    return 1",
        "import os\n    os.execv('/bin/true', ['true'])",
        "import os\n    os.kill(os.getppid(), 9)\n    return 1",
        "return len(open('/etc/passwd').read())",
        "import socket\n    socket.socket()\n    return 1",
    ],
)
def test_what_gives_no_number(programs: Programs, body: str) -> None:
    assert programs.run([f"    {body}\n"]) == [(None, "none")]


def test_nothing_gets_out(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "made"
    bodies = [
        f"    import os\n    os.system('touch {target}')\n    return 7\n",
        f"    import os\n    os.mkdir('{target}')\n    return 7\n",
        "    import os\n    os.write(3, b'9' * 10**6)\n    return 7\n",
        "    global math\n    math = None\n    return 7\n",
    ]
    programs.run(bodies)
    assert not target.exists()
    # Another program sees none of it, and the process that ran them lives.
    assert programs.run(["    return math.floor(7.5)\n"]) == [(7.0, "ok")]


def test_the_clock() -> None:
    late = ProgramAnswer(Programs(cpu_seconds=5, seconds=1))
    began = time.monotonic()
    outcomes = late.score([{"response": "    import time\n    time.sleep(60)\n", "label": "1"}] * 2, SOURCE)
    assert time.monotonic() - began < 30
    late.close()
    assert [outcome.score for outcome in outcomes] == [0.0, 0.0]
    assert outcomes[0].metrics == {"correct": 0.0, "parsable": 0.0, "timed_out": 1.0}


def test_rewards() -> None:
    source = VerifierReward(SOURCE)
    rows = [
        ("    return 8.933\n", "8.93"),
        ("    return 9\n", "8.93"),
        ("    retrun 9\n", "9"),
        ("    return 1024\n", "1,024"),
    ]
    samples = [{"response": response, "label": label} for response, label in rows]
    outcomes = source.score([*samples, {"response": "x", "label": None}, {"response": "x", "label": "b"}])
    assert [outcome.score for outcome in outcomes] == [1.0, 0.1, 0.0, 1.0, None, None]
    assert outcomes[4].status == "missing"
    assert outcomes[5] == Outcome("error", error="program_answer: the label must be a number, not 'b'")
    child = source._verify._programs._child._process.pid  # type: ignore[union-attr]
    os.kill(child, 9)
    time.sleep(0.2)
    assert source.score(samples[:1])[0].score == 1.0  # another one is started
    source.close()
