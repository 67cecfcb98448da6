"""`python -m ocd_cli` is the same as `ocd`."""

import sys
from pathlib import Path

if not sys.flags.safe_path and sys.path[0] != str(Path(__file__).resolve().parents[1]):
    # Python has put the working directory first, where a file may have the name of a library.
    del sys.path[0]

from ocd_cli.app import main

if __name__ == "__main__":
    main()
