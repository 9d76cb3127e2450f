"""Where a progress bar is of use: before a person, not in a log or in a notebook whose output is kept."""

from __future__ import annotations

import os
import sys


def interactive() -> bool:
    """True in a terminal and in JupyterLab; False under papermill, nbval and in a pipe."""
    return sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ
