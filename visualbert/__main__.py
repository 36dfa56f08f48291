"""`python -m visualbert` is the command `visualbert`."""

import sys

from visualbert.cli import main

sys.exit(main())
