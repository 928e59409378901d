from __future__ import annotations

import pytest

from benchmarks.cost.machine import SLEEPING


@pytest.fixture(autouse=True)
def threads_that_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run side by side, with threads that sleep while idle; commands that measure time refuse those."""
    for name in SLEEPING:
        monkeypatch.delenv(name, raising=False)
