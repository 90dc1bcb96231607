"""The processor time that steps take, as the metrics pages of clusters tell it: what of their cost the database does not know."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable
from http.client import HTTPException
from urllib.request import urlopen

logger = logging.getLogger("durable_cluster.console")

WAIT_S = 1.0
BYTES_MAX = 16 << 20
SECONDS = re.compile(r'^durable_step_cpu_seconds_total\{workflow="([^"]+)"\} ([0-9.e+-]+)$', re.MULTILINE)


def step_cpu_s(pages: Iterable[str]) -> dict[str, float]:
    """Seconds by type of workflow, of all these pages together; none of those that do not answer."""
    found: defaultdict[str, float] = defaultdict(float)
    for page in pages:
        try:
            with urlopen(page, timeout=WAIT_S) as answer:
                text = answer.read(BYTES_MAX).decode("utf-8", "replace")
        except (OSError, HTTPException) as error:
            logger.warning("a cluster's metrics cannot be read (%s)", type(error).__name__)
            continue
        for name, seconds in SECONDS.findall(text):
            found[name] += float(seconds)
    return {name: seconds for name, seconds in found.items() if seconds}
