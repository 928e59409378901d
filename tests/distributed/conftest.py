from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """So many ranks, which live until the session ends."""
    made: dict[int, Ranks] = {}

    def of(size: int) -> Ranks:
        if size not in made:
            made[size] = Ranks(size, tmp_path_factory.mktemp(f"ranks{size}"))
        return made[size]

    yield of
    for ranks in made.values():
        ranks.close()
