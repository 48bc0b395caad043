"""python -m kosmosg.cli"""

import sys

from kosmosg.cli import main

sys.exit(main())
