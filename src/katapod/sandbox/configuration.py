"""The configuration as a sandbox is started with it, whoever starts it."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from katapod.model.config import Config, check_paths, load_config
from katapod.model.config_annotations import annotated

__all__ = ["read_config"]

log = logging.getLogger(__name__)


def read_config(path: str, annotations: Mapping[str, str] | None = None) -> Config:
    """That of the file at `path`, else of where configuration.toml is usually found, changed by a spec's `annotations`.
    What is wrong with it but stops nobody is logged. Raises ConfigError, also if a file that a guest is made of is
    missing."""
    parsed = load_config(Path(path) if path else None)
    for problem in parsed.problems:
        log.warning("%s", problem)
    if annotations is not None:
        parsed = annotated(parsed, annotations, len(os.sched_getaffinity(0)))
    return check_paths(parsed, os.path.exists)
