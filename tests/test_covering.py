"""What stands for a table by default: few of its cells, in which all values meet."""

import itertools

import pytest
from support.covering import covering

CELLS = list(itertools.product("abcd", "ef", range(3)))[:-2]


@pytest.mark.parametrize(("strength", "most"), [(1, 4), (2, 13), (3, len(CELLS))])
def test_all_values_meet_in_few_cells(strength, most):
    chosen = [CELLS[i] for i in covering(CELLS, strength)]
    for axes in itertools.combinations(range(3), strength):
        meet, met = ({tuple(cell[axis] for axis in axes) for cell in cells} for cells in (CELLS, chosen))
        assert met == meet
    assert len(chosen) <= most
