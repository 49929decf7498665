import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from rlhfctl.errors import Refused
from rlhfctl.recipe.sections import PythonSource
from rlhfctl.rewards.outcome import Outcome, Span
from rlhfctl.rewards.python_source import PythonReward

Make = Callable[..., PythonReward]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """make(code, function="score", timeout=30) -> a source over a file with that code; closed afterwards."""
    made: list[PythonReward] = []

    def build(code: str, function: str = "score", timeout: float = 30.0) -> PythonReward:
        path = tmp_path / "rewards.py"
        path.write_text(code)
        made.append(
            PythonReward(PythonSource(kind="python", path=str(path), function=function, timeout=timeout))
        )
        return made[-1]

    yield build
    for source in made:
        source.close()


def rows(*responses: str, **metadata: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": str(index),
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
            "response": response,
            "label": index,
            "metadata": metadata,
        }
        for index, response in enumerate(responses)
    ]


def scores(outcomes: list[Outcome]) -> list[float | None]:
    assert all(outcome.status == "ok" for outcome in outcomes), outcomes
    return [outcome.score for outcome in outcomes]


def test_whole_samples_reach_the_function(make: Make) -> None:
    source = make(
        "def score(samples):\n"
        "    keys = {'id', 'messages', 'response', 'label', 'metadata'}\n"
        "    return [len(s['response']) + s['label'] + s['metadata']['bonus'] + (set(s) == keys) for s in samples]\n"
    )
    assert scores(source.score(rows("a", "bb", "ccc", bonus=10))) == [12.0, 14.0, 16.0]
    assert source.score([]) == []


def test_dicts_with_spans_and_metrics(make: Make) -> None:
    source = make(
        "def score(samples):\n"
        "    return [{'score': 2, 'spans': [{'start': 0, 'end': 2, 'score': 0.5}], 'metrics': {'words': 3}}]\n"
    )
    assert source.score(rows("hello")) == [Outcome("ok", 2.0, [Span(0, 2, 0.5)], {"words": 3.0}, None)]


def test_openrlhf_signature(make: Make) -> None:
    source = make(
        "import torch\n"
        "def reward_func(queries, prompts, labels):\n"
        "    assert queries == [p + r for p, r in zip(prompts, ('a', 'bb'))], queries\n"
        "    assert prompts == ['s\\nq'] * 2\n"
        "    rewards = torch.tensor(labels, dtype=torch.float32)\n"
        "    return {'rewards': rewards, 'scores': rewards, 'extra_logs': {'twice': rewards * 2}}\n",
        "reward_func",
    )
    outcomes = source.score(rows("a", "bb"))
    assert scores(outcomes) == [0.0, 1.0]
    assert [outcome.metrics for outcome in outcomes] == [{"twice": 0.0}, {"twice": 2.0}]


def test_openrlhf_logs_that_are_no_number_a_query_cost_no_score(make: Make) -> None:
    source = make(
        "def reward_func(queries, prompts, labels):\n"
        "    logs = {'all': 0.5, 'none': None, 'name': ['x', 'y'], 'some': [float('nan'), 2], 'one': [1]}\n"
        "    return {'rewards': labels, 'scores': labels, 'extra_logs': logs}\n",
        "reward_func",
    )
    outcomes = source.score(rows("a", "bb"))
    assert scores(outcomes) == [0.0, 1.0]
    assert [outcome.metrics for outcome in outcomes] == [{}, {"some": 2.0}]


def test_openrlhf_signature_with_a_plain_tensor(make: Make) -> None:
    source = make(
        "import numpy\ndef f(queries, prompts, labels, **kwargs):\n    return numpy.array([len(q) for q in queries])\n",
        "f",
    )
    assert scores(source.score(rows("a", "bb"))) == [4.0, 5.0]


def test_trl_signature_with_texts_and_columns(make: Make) -> None:
    source = make(
        "def reward(prompts, completions, answer, level, **kwargs):\n"
        "    return [len(c) + a + l for c, a, l in zip(completions, answer, level)]\n",
        "reward",
    )
    assert scores(source.score(rows("a", "bb", level=100))) == [101.0, 103.0]


def test_trl_signature_with_messages(make: Make) -> None:
    source = make(
        "def reward(completions, **kwargs):\n    return [len(c[0]['content']) for c in completions]\n",
        "reward",
    )
    assert scores(source.score(rows("a", "bb"))) == [1.0, 2.0]
    assert scores(source.score(rows("ccc"))) == [3.0]


@pytest.mark.parametrize(
    "body",
    [
        "[len(c[0]['content']) for c in completions]",
        "[sum(len(m['content']) for m in c) for c in completions]",
    ],
)
def test_an_empty_answer_says_nothing_of_the_form(make: Make, body: str) -> None:
    """Its text has no first message, or is a list without any."""
    for batches in (("", "a"), ("bb",)), (("",), ("", ""), ("a",), ("", "bb")):
        source = make(f"def reward(completions, **kwargs):\n    return {body}\n", "reward")
        for batch in batches:
            assert scores(source.score(rows(*batch))) == [float(len(text)) for text in batch]
        source.close()


def test_a_function_for_texts_stays_one_where_it_trips_over_a_row(make: Make) -> None:
    """Called with lists this one finds its mark in none, and would say 0 to everything from then on."""
    code = (
        "def reward(completions, answer, **kwargs):\n"
        "    found = []\n"
        "    for text, right in zip(completions, answer):\n"
        "        if '?' in text:\n"
        "            right = right['missing']\n"
        "        found.append(float('#' in text and text[1:] == str(right)))\n"
        "    return found\n"
    )
    source = make(code, "reward")
    assert [outcome.score for outcome in source.score(rows("#0", "?", "#2"))] == [1.0, None, 1.0]
    source.close()
    source = make(code, "reward")
    source.score(rows("?"))  # alone it could be a list of messages that is asked for: that is not kept
    assert scores(source.score(rows("#0", "#7"))) == [1.0, 0.0]


def test_trl_function_that_takes_neither_form(make: Make) -> None:
    source = make("def reward(completions):\n    return [c.nothing for c in completions]\n", "reward")
    (outcome,) = source.score(rows("a"))
    assert outcome.status == "error"
    assert outcome.error is not None
    assert "called with texts: AttributeError: 'str'" in outcome.error
    assert "called with lists of messages: AttributeError: 'list'" in outcome.error


def test_trl_column_that_is_not_there(make: Make) -> None:
    source = make(
        "def reward(prompts, completions, difficulty):\n    return [0.0] * len(prompts)\n", "reward"
    )
    (outcome,) = source.score(rows("a", level=1))
    assert outcome.status == "error"
    assert "needs a column 'difficulty'; the rows have answer" in (outcome.error or "")


def test_prints_do_not_touch_the_protocol(
    make: Make, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    source = make(
        "import os, subprocess, sys\n"
        "print('at import')\n"
        "def score(samples):\n"
        '    print(\'{"status": "ok"}\')\n'
        "    os.write(1, b'raw bytes\\n')\n"
        "    subprocess.run(['echo', 'from a child of the child'])\n"
        "    assert sys.stdin.read() == ''\n"
        "    return [1.0 for _ in samples]\n"
    )
    assert scores(source.score(rows("a", "b"))) == [1.0, 1.0]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert all(text in captured.err for text in ("at import", "raw bytes", "from a child of the child"))


def test_a_sample_that_raises_fails_alone(make: Make) -> None:
    source = make("def score(samples):\n    return [1 / len(s['response']) for s in samples]\n")
    first, second, third = source.score(rows("ab", "", "abcd"))
    assert scores([first, third]) == [0.5, 0.25]
    assert (second.status, second.score) == ("error", None)
    assert second.error == "rewards.score: ZeroDivisionError: division by zero (line 2)"


@pytest.mark.parametrize(
    ("returned", "status", "error"),
    [
        ("[1.0]", "error", "returned 1 scores for 2 samples"),
        ("[1.0, 2.0, 3.0]", "error", "returned 3 scores for 2 samples"),
        ("0.5", "error", "ValueError: returned float instead of a list of scores"),
        ("None", "error", "ValueError: returned NoneType instead of a list of scores"),
        ("[float('nan')] * 2", "error", "returned a number that is not finite: nan"),
        ("[float('-inf')] * 2", "error", "returned a number that is not finite: -inf"),
        ("[10**400] * 2", "error", "returned a number that is not finite: 1000"),
        ("[-(10**5000)] * 2", "error", "returned a number that is not finite: int"),
        ("[{'score': 1, 'metrics': {'m': 10**400}}] * 2", "error", "not finite"),
        (
            "[{'score': 1, 'spans': [{'start': 0, 'end': 1, 'score': 10**400}]}] * 2",
            "error",
            "not finite",
        ),
        (
            "[{'score': 1, 'spans': [{'start': 0, 'end': 10**5000, 'score': 1}]}] * 2",
            "error",
            "a span outside the response (0 to 1): list",
        ),
        ("['high'] * 2", "error", "returned something that is not a score"),
        (
            "[type('Odd', (), {'__float__': lambda self: 1 / 0})()] * 2",
            "error",
            "returned something that is not a score (division by zero)",
        ),
        ("[{'value': 1}] * 2", "error", "returned a dict without 'score'"),
        ("[{'score': 1, 'metrics': {'m': float('inf')}}] * 2", "error", "not finite"),
        (
            "[{'score': 1, 'spans': [{'start': 0, 'end': 9, 'score': 1}]}] * 2",
            "error",
            "a span outside the response",
        ),
        ("[{'score': 1, 'spans': [(0, 1)]}] * 2", "error", "returned something that is not a score"),
        ("[None] * 2", "missing", "returned None"),
        ("[{'score': None}] * 2", "missing", "returned the score None"),
    ],
)
def test_what_is_no_score_is_never_a_zero(make: Make, returned: str, status: str, error: str) -> None:
    for outcome in make(f"def score(samples):\n    return {returned}\n").score(rows("a", "b")):
        assert (outcome.status, outcome.score) == (status, None)
        assert error in (outcome.error or "")


def test_a_hang_is_a_timeout_and_the_next_batch_works(make: Make, tmp_path: Path) -> None:
    """The child of the hanging function dies with it."""
    source = make(
        "import subprocess, time\n"
        "def score(samples):\n"
        "    if samples[0]['response'] == 'hang':\n"
        "        child = subprocess.Popen(['sleep', '300'])\n"
        f"        open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "        while True: time.sleep(0.1)\n"
        "    return [1.0 for _ in samples]\n",
        timeout=1.0,
    )
    assert scores(source.score(rows("fine"))) == [1.0]
    began = time.monotonic()
    outcomes = source.score(rows("hang", "b"))
    assert time.monotonic() - began < 5
    assert [(o.status, o.score, o.error) for o in outcomes] == [
        ("timeout", None, "rewards.score: no answer after 1 s")
    ] * 2
    assert _gone(int((tmp_path / "pid").read_text()))
    assert scores(source.score(rows("fine"))) == [1.0]


@pytest.mark.parametrize(
    ("last_act", "error"),
    [
        ("os._exit(7)", "rewards.score: ended with exit code 7"),
        ("os.kill(os.getpid(), 11)", "rewards.score: was killed by SIGSEGV"),
        ("sys.exit(3)", "rewards.score: SystemExit: 3 (line 4)"),
    ],
)
def test_a_function_that_ends_its_process(make: Make, last_act: str, error: str) -> None:
    source = make(
        "import os, sys\ndef score(samples):\n    if samples[0]['response'] == 'die':\n"
        f"        {last_act}\n    return [1.0 for _ in samples]\n"
    )
    (outcome,) = source.score(rows("die"))
    assert (outcome.status, outcome.error) == ("error", error)
    assert scores(source.score(rows("fine"))) == [1.0]


@pytest.mark.parametrize(
    ("code", "function", "error"),
    [
        (
            "import nothing_of_the_kind\n",
            "score",
            "rewards.py: ModuleNotFoundError: No module named 'nothing_of",
        ),
        ("def score(x:\n", "score", "SyntaxError: '(' was never closed"),
        ("raise ValueError('at import')\n", "score", "ValueError: at import (line 1)"),
        ("def scores(samples): ...\n", "score", "has no function 'score'; did you mean scores?"),
        ("score = 3\n", "score", "has no function 'score'; it has none"),
        ("def score(a, b): ...\n", "score", "score(a, b) has none of the accepted signatures: (samples),"),
        ("def score(): ...\n", "score", "score() has none of the accepted signatures"),
    ],
)
def test_an_unusable_file_is_one_sentence(make: Make, code: str, function: str, error: str) -> None:
    (outcome,) = make(code, function).score(rows("a"))
    assert outcome.status == "error"
    assert error in (outcome.error or "")
    assert "\n" not in (outcome.error or "")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"absent\.py does not exist; check reward\.sources"):
        PythonReward(PythonSource(kind="python", path=str(tmp_path / "absent.py")))


def test_neighbouring_modules_import(make: Make, tmp_path: Path) -> None:
    (tmp_path / "helper_of_the_reward.py").write_text("BONUS = 4.0\n")
    source = make(
        "import helper_of_the_reward as h\ndef score(samples):\n    return [h.BONUS for _ in samples]\n"
    )
    assert scores(source.score(rows("a"))) == [4.0]


def test_large_batches_and_odd_characters(make: Make) -> None:
    source = make("def score(samples):\n    return [len(s['response']) for s in samples]\n")
    responses = ["x\u2028\n\ud83d" * 20_000, "\x00", "\U0001f600"] * 20
    assert scores(source.score(rows(*responses))) == [80_000.0, 1.0, 1.0] * 20


def test_the_process_is_our_own_and_light(make: Make) -> None:
    source = make(
        "import os, sys\ndef score(samples):\n"
        "    return [{'score': os.getpid(), 'metrics': {'torch': 'torch' in sys.modules}} for _ in samples]\n"
    )
    (outcome,) = source.score(rows("a"))
    assert outcome.score != os.getpid()
    assert outcome.metrics == {"torch": 0.0}
    assert source.score(rows("b"))[0].score == outcome.score
    source.close()
    assert outcome.score is not None
    assert _gone(int(outcome.score))


def test_the_process_ends_with_its_parent_even_in_mid_call(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "import os, time\ndef score(samples):\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()) + '.')\n    time.sleep(300)\n"
    )
    code = (
        "from rlhfctl.recipe.sections import PythonSource; from rlhfctl.rewards.python_source import PythonReward; "
        f"PythonReward(PythonSource(kind='python', path={str(tmp_path / 'rewards.py')!r}))"
        ".score([{'response': '', 'messages': [], 'label': 0, 'id': '', 'metadata': {}}])"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    pid_file = tmp_path / "pid"
    _wait(lambda: pid_file.exists() and pid_file.read_text().endswith("."))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert _gone(int(pid_file.read_text()[:-1]))


def _wait(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _gone(pid: int) -> bool:
    """Ended, or a zombie that nobody has waited for (in a container without an init process)."""

    def ended() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    return _wait(ended, 10.0)


def test_values_that_json_does_not_know_reach_the_function_as_text(make: Make) -> None:
    source = make("def score(samples):\n    return [float(s['metadata']['price']) for s in samples]\n")
    assert scores(source.score(rows("a", price=Decimal("1.5"), day=date(2025, 1, 15)))) == [1.5]
