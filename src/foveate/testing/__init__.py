"""Public helpers for tests: the common checks, tiny random models, and attention calls of every shape.

from foveate.testing import check_mechanism
check_mechanism(MyMetric)
"""

from foveate.testing import policies, tiny, views
from foveate.testing.checks import CheckFailed, check_mechanism, checks_for

__all__ = ["CheckFailed", "check_mechanism", "checks_for", "policies", "tiny", "views"]
