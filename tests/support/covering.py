"""Which cases of a large matrix `make test` runs; the others wait for `make test-full`.

``@pytest.mark.covering("row divergence.operands", "divergence")`` keeps cases of a test so that every
combination of a row and a kind of operands, and every divergence, occurs in one: each string names
axes (parameters, or attributes of theirs) whose values are to meet. For each backend by itself, unless ``backend`` is among the axes.
"""

from itertools import combinations, product


def combinations_of(parameters, groups):
    """What one case covers: for every group of axes the values that it has there."""

    def value(axis):
        name, *attributes = axis.split(".")
        found = parameters[name]
        for attribute in attributes:
            found = getattr(found, attribute)
        return repr(found)

    return {(group, *map(value, group.split())) for group in groups}


def cover(cases, chosen=()):
    """Indices of few of ``cases``, sets of hashables, in which every element of any of them occurs.

    ``chosen`` are taken anyway; then always the first of those that add the most.
    """
    chosen = list(chosen)
    missing = set().union(*cases).difference(*(cases[i] for i in chosen))
    while missing:
        best = max(range(len(cases)), key=lambda i: (len(cases[i] & missing), -i))
        chosen.append(best)
        missing -= cases[best]
    return sorted(chosen)


def pairwise(axes):
    """Rows, dicts of one value of each axis, in which any two values of two axes meet.

    ``axes``: name -> values. Each row begins with a pair that is missing and takes, axis by axis,
    the value that meets the most missing ones.
    """
    rows = []
    missing = pairs({name: range(len(values)) for name, values in axes.items()})
    while missing:
        (a, x), (b, y) = min(missing)
        row = {a: [x], b: [y]}
        for name in axes:
            choices = [{**row, name: [i]} for i in range(len(axes[name]))]
            row = row if name in row else max(choices, key=lambda r: len(pairs(r) & missing))
        missing -= pairs(row)
        rows.append({name: axes[name][row[name][0]] for name in axes})
    return rows


def pairs(indices):
    """The pairs of values of different axes, of the indices that each axis has."""
    points = [[(name, i) for i in several] for name, several in indices.items()]
    return {tuple(sorted(pair)) for a, b in combinations(points, 2) for pair in product(a, b)}


def mark_the_rest(items, full, always):
    """Give the mark ``full`` to the items that their covering mark does not keep.

    ``always``: node ids that are kept, such as the cases that kill a mutation.
    """
    functions = {}
    for item in items:
        if item.get_closest_marker("covering") is not None:
            groups = item.get_closest_marker("covering").args
            split = not any("backend" in group.split() for group in groups)
            backend = item.callspec.params.get("backend") if split else None
            functions.setdefault((item.parent.nodeid, item.originalname, backend), []).append(item)
    for same in functions.values():
        (groups,) = {item.get_closest_marker("covering").args for item in same}
        cases = [combinations_of(item.callspec.params, groups) for item in same]
        kept = cover(cases, [i for i, item in enumerate(same) if item.nodeid in always])
        for i in set(range(len(same))) - set(kept):
            same[i].add_marker(full)
