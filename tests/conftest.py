"""What every test gets: quiet libraries, one thread, no network, and the path of the shared models and data."""

import os
from pathlib import Path

# Before any test imports torch or tokenizers, and inherited by every subprocess a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

# Examples are derived from each test's code and no deadline depends on the load: same code, same result.
settings.register_profile("rlhfctl", derandomize=True, deadline=None, database=None)
settings.load_profile("rlhfctl")

REPO = Path(__file__).resolve().parent.parent


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
