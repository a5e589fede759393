"""Settings for all tests."""

from hypothesis import settings

settings.register_profile("default", deadline=None)  # tests time nothing
# For tests/unit/test_properties.py:
settings.register_profile("deep", max_examples=100_000, deadline=None, database=None)
