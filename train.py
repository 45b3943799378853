"""accelerate launch train.py: trains the built-in demo; `python train.py --help` lists every setting."""

import sys

from accel_clip.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
