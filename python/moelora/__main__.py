"""`python -m moelora`: the same as the command `moelora`."""

import sys

from moelora.cli import main

sys.exit(main())
