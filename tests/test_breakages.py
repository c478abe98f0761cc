"""The lists of breakages fit the package: `python tests/breakages/run.py` can make each of them."""

import pytest

from tests.breakages.run import read_breakages
from tests.environment import ROOT

BREAKAGES = read_breakages()


def test_there_are_enough_and_none_twice():
    assert len(BREAKAGES) >= 60
    assert len({(each.file, each.old, each.new) for each in BREAKAGES}) == len(BREAKAGES)


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda each: each.name)
def test_the_text_to_break_occurs_once(breakage):
    assert (ROOT / breakage.file).read_text().count(breakage.old) == 1
    assert breakage.old != breakage.new
    file, _, name = breakage.test.partition("::")
    assert f"def {name.partition('[')[0].rpartition('::')[2]}(" in (ROOT / file).read_text()
