"""`python -m srlm_lite`."""

from srlm_lite.cli.main import run

run()
