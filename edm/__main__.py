"""Run the command line with `python -m edm`."""

from __future__ import annotations

from edm.cli import main

main()
