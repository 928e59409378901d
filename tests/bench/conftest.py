from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def threads_that_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run side by side, with threads that sleep while idle; commands that measure time refuse those."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
