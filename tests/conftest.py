"""What every test gets: quiet libraries, one thread, no network, and the path of the shared models and data."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before any test imports torch or tokenizers, and inherited by every subprocess a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Rows that runs prepare: kept for this suite's runs alone, whose processes inherit the directory.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["RLHFCTL_CACHE"] = tempfile.mkdtemp(prefix="rlhfctl-tests-")

# A suite that a shell started in the background ignores SIGINT, and so would every run whose Ctrl-C a test tries.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from hypothesis import settings

# Examples are derived from each test's code and no deadline depends on the load: same code, same result.
settings.register_profile("rlhfctl", derandomize=True, deadline=None, database=None)
settings.load_profile("rlhfctl")

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """As they were: a command that ends in this process leaves Ctrl-C ignored, which runs of later tests inherit."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def pytest_sessionfinish() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["RLHFCTL_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first: last, one of them would keep a single process busy at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


sys.path.append(str(REPO / "tests"))  # what tests of several folders share: tests/fake_*.py


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models and data kept beside the checkout. Absent: skipped on a developer's box, a failure in CI."""
    path = Path(os.environ.get("RLHFCTL_SHARED", REPO.parent / "shared"))
    if path.is_dir():
        return path
    reason = f"no shared models and data at {path} (set RLHFCTL_SHARED)"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart task, small: model/ (configuration and tokenizer), data/{sft,prompts,eval}.jsonl."""
    import json

    from rlhfctl.quickstart.chains import make_rows, write_model

    out = tmp_path_factory.mktemp("chains")
    write_model(out / "model")
    (out / "data").mkdir()
    for name, rows in make_rows(0).items():
        lines = [json.dumps(row) + "\n" for row in rows[:400]]
        (out / "data" / f"{name}.jsonl").write_text("".join(lines))
    return out
