"""Studies: several arms, several seeds, one table and one figure.

python experiments/study.py check router_zoo    every arm takes one training step
python experiments/study.py run router_zoo      trains what is not done yet
python experiments/study.py time router_zoo     the cost of each arm's training step
python experiments/study.py report router_zoo   results.csv, table.md and figure.png
"""

import sys

from studies.command import main

if __name__ == "__main__":
    sys.exit(main())
