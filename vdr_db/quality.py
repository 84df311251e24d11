"""The names of `vdr_db.evaluation.quality`, which stood here before."""

from vdr_db.evaluation.quality import *  # noqa: F403
