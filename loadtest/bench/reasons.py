"""Why a goal is out of reach so far: the physical cost, and what was tried. By the criterion's words in ``verdicts``."""

from __future__ import annotations

from types import MappingProxyType

REASONS = MappingProxyType({"W5 fan-out with join": "the product has no joins yet."})
