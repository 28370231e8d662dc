"""Few cells of a table that stand for all: a covering array, as combinatorial testing calls it."""

import itertools


def covering(cells, strength):
    """Indices of cells that cover a table: any `strength` values of different axes that meet in it meet in one of them.

    A cell is a tuple with one value per axis. With a strength of one each value is there; with two each pair is.
    """
    meetings = [set(itertools.combinations(enumerate(cell), min(strength, len(cell)))) for cell in cells]
    missing, chosen = set().union(*meetings), []
    while missing:
        best = max(range(len(cells)), key=lambda i: len(meetings[i] & missing))
        chosen.append(best)
        missing -= meetings[best]
    return sorted(chosen)
