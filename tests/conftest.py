"""Settings for all tests."""

from hypothesis import settings

settings.register_profile("deep", max_examples=100_000, database=None)  # see tests/unit/test_properties.py
