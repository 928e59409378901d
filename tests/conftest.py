from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from normopt.ingredient import Ingredient
from normopt.optimizer import SteepestDescent

# Its asserts say what they compared, as those of the tests do.
pytest.register_assert_rewrite("tests.support")

# The tensors are small; waiting for a second thread costs more than it saves, above all on a busy machine.
torch.set_num_threads(1)

# The same examples in every run: a red test is red again tomorrow, and somewhere else.
settings.register_profile("normopt", deadline=None, derandomize=True, database=None, max_examples=15)
# pytest --hypothesis-profile=search looks further than the tests' own budget.
settings.register_profile("search", deadline=None, max_examples=250)
settings.load_profile("normopt")


#: Folders whose tests stay on the CPU: they are of processes, of files and of clocks.
ON_CPU = {"bench", "distributed", "docs"}


def pytest_addoption(parser: pytest.Parser) -> None:
    help_ = "where tests make their tensors: cpu (default) or cuda; without a GPU, --device cuda skips all tests"
    parser.addoption("--device", default="cpu", help=help_)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    device = request.config.getoption("--device")
    if device == "cpu" or ON_CPU & {*request.path.parts}:
        yield
        return
    with torch.device(device):
        yield


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fast is what is asked of one optimizer of each family; slow, of all that have ingredients of their own.

    What takes the gate more time than it has is exhaustive: what is asked of the kin of other optimizers, and what its
    test says.
    """
    from tests.support.optimizers import FAMILIES, KIN, ZOO  # after its asserts have been rewritten

    if config.getoption("--device").startswith("cuda") and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="--device: torch sees no GPU here"))
    for item in items:
        named = ZOO.keys() & {*item.nodeid.partition("[")[2].rstrip("]").split("-")}
        of_all = {"bench", "contract", "docs", "models"} & {*item.path.parts}
        if of_all and named - {*FAMILIES}:
            item.add_marker(pytest.mark.slow)
        if of_all and named & KIN - {*FAMILIES}:
            item.add_marker(pytest.mark.exhaustive)


@pytest.fixture
def registry() -> Iterator[None]:
    """Forget the ingredients and optimizers that a test defines."""
    classes, optimizers = dict(Ingredient._classes), dict(SteepestDescent.registry)
    yield
    SteepestDescent.registry.clear()
    SteepestDescent.registry.update(optimizers)
    Ingredient._classes.clear()
    Ingredient._classes.update(classes)
    Ingredient._parsed.clear()
