"""`python -m clipvisionalign` is the command `clipvisionalign`."""

import sys

from clipvisionalign.cli import main

if __name__ == "__main__":
    sys.exit(main())
