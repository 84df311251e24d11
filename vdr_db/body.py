"""The names of `vdr_db.towers.text_body`, which stood here before."""

from vdr_db.towers.text_body import *  # noqa: F403
