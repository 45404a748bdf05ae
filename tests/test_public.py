"""The public names, in one place."""

import subprocess
import sys

import evener


def test_public_names() -> None:
    """What `__all__` lists is there, and nothing else is promised."""
    assert sorted(evener.__all__) == ["EvenerError", "LLM", "SamplingParams"]
    for name in evener.__all__:
        assert getattr(evener, name).__doc__


def test_import_is_light() -> None:
    """`import evener` and the brain pull in no torch."""
    code = "import sys, evener, evener.brain, evener.execute.sim.body; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
