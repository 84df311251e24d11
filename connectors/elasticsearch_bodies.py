"""The names of `vdr_db.connectors.elasticsearch.bodies`, which stood here before."""

from vdr_db.connectors.elasticsearch.bodies import *  # noqa: F403
