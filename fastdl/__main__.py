"""python -m fastdl: see fastdl.cli."""

import sys

from fastdl.cli import main

sys.exit(main())
