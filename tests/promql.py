"""PromQL, as far as tests have to take it apart."""

from __future__ import annotations

import re

TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[(\[{]|[)\]}]|\b(?:and|or|unless)\b|[=!<>]=|[<>]|.', re.DOTALL)
MATCHING = re.compile(r"^\s*(?:on|ignoring)\s*\([^)]*\)")
ABSENT = re.compile(r"^absent(?:_over_time)?\((.*)\)$", re.DOTALL)
METRIC = re.compile(r"\bdurable_[a-z_]+\b")


def operands(expr: str) -> list[str]:
    """What an alert compares: the parts of its expression between and, or, unless, each up to its comparison.

    These have values also while all is well. What has to be absent is taken as it is.
    """
    parts, depth, is_behind_comparison = [""], 0, False
    for token in TOKEN.findall(expr):
        depth += (token in "([{") - (token in ")]}")
        if depth == 0 and token in ("and", "or", "unless"):
            parts.append("")
            is_behind_comparison = False
        elif depth == 0 and token in ("==", "!=", "<=", ">=", "<", ">"):
            is_behind_comparison = True
        elif not is_behind_comparison:
            parts[-1] += token
    bare = [MATCHING.sub("", part).strip() for part in parts]
    return [found[1] if (found := ABSENT.match(part)) else part for part in bare]


def metrics(expr: str) -> set[str]:
    """Our metrics in it, without what a histogram's series add to its name."""
    return {re.sub(r"_(?:bucket|sum|count)$", "", name) for name in METRIC.findall(expr)}
