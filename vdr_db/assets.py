"""The names of `vdr_db.checkpoints.assets`, which stood here before."""

from vdr_db.checkpoints.assets import *  # noqa: F403
