"""Public helpers for tests: the common checks, tiny models (random, or written by hand), attention calls of any shape.

from foveate.testing import check_mechanism
check_mechanism(MyMetric)
"""

from foveate.testing import handmade, tiny, views
from foveate.testing.checks import CheckFailed, check_mechanism, checks_for

__all__ = ["CheckFailed", "check_mechanism", "checks_for", "handmade", "tiny", "views"]
