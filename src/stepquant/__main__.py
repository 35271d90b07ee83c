"""`python -m stepquant`."""

import sys

from stepquant.cli import main

sys.exit(main())
