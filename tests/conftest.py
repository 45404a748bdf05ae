"""Hypothesis draws the same examples in every CI run: a new failure there is a new defect, not new luck."""

import os
import tempfile

from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Packed weights and profiles of the tests, and of the workers that they start, are no business of the user's cache.
_cache = tempfile.TemporaryDirectory(prefix="evener-tests-")
os.environ["EVENER_CACHE"] = _cache.name
