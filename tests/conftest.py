"""Hypothesis draws the same examples in every CI run: a new failure there is a new defect, not new luck."""

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
