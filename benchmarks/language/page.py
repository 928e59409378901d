"""`python -m benchmarks report --html`: one page of runs on file, whichever commands made them."""

import sys
from argparse import Namespace

from benchmarks.harness import PlanError
from benchmarks.output.page import write_page
from benchmarks.output.records import RESULTS, unreadable


def page(arguments: Namespace) -> int:
    """Write the page of the runs in `arguments.runs` to `arguments.out`; returns the exit code."""
    if missing := [str(folder) for folder in arguments.runs if not (folder / RESULTS).exists()]:
        raise PlanError(f"no runs in {', '.join(missing)}: give folders that hold a {RESULTS}")
    for folder in arguments.runs:
        if lost := unreadable(folder / RESULTS):
            print(lost, file=sys.stderr)
    try:
        print(f"Written: {write_page(arguments.runs, arguments.out)}")
    except ValueError as error:
        raise PlanError(str(error)) from None
    return 0
