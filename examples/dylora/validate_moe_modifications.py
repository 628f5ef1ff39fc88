"""Check that one pass of moelora does what DyLoRA's N passes did, on your own checkpoint.

    python validate_moe_modifications.py --checkpoint DIR [--model M] [--data FILE] [--json FILE]

The same as ``moelora validate``, see its ``--help`` for all options; exit status 1 if a promise fails.
"""

import sys

from moelora.cli import main

if __name__ == "__main__":
    sys.exit(main(["validate", *sys.argv[1:]]))
