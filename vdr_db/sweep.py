"""The names of `vdr_db.evaluation.sweep`, which stood here before."""

from vdr_db.evaluation.sweep import *  # noqa: F403
