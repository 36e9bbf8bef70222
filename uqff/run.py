"""``python -m uqff.run``: the command ``uqff run``, as torchrun starts it on every rank.

python -m torch.distributed.run --nproc-per-node 2 -m uqff.run DIR --prompt TEXT
"""

import sys

from uqff.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]], prog_name="uqff")
