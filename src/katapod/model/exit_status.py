"""Exit statuses that we tell ourselves. Apart, for programs that load next to nothing."""

import signal

__all__ = ["KILLED_STATUS"]

KILLED_STATUS = 128 + signal.SIGKILL
"""The exit status of what SIGKILL has ended, and of what ended unseen with its VM. Source: bash(1), EXIT STATUS."""
