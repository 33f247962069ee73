"""`python -m plexd` is the command `plexd`."""

import sys

from plexd.cli.main import main

sys.exit(main())
