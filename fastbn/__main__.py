"""`python -m fastbn`."""

import sys

from fastbn.cli import main

sys.exit(main())
