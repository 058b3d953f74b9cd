"""KATAPOD_TESTS_LARGE=1: transfers of full size, which take minutes under software emulation."""

import os

__all__ = ["LARGE"]

LARGE = os.environ.get("KATAPOD_TESTS_LARGE", "") == "1"
