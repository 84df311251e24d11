"""`python -m vdr_db.cli` is `vdr-db`."""

import sys

from vdr_db.cli.main import main

sys.exit(main())
