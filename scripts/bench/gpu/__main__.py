"""One section, in this process: `python -m bench.gpu NAME FOLDER SECONDS LAYERS [--dry PATH]`; `sections` starts it."""

import argparse
import warnings
from pathlib import Path

from bench.gpu.sections import SECTIONS, run_section

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("name", choices=SECTIONS)
parser.add_argument("folder", type=Path)
parser.add_argument("seconds", type=float)
parser.add_argument("layers", type=int)
parser.add_argument("--dry", default="")
given = parser.parse_args()
warnings.simplefilter("ignore")
run_section(given.name, given.folder, given.seconds, given.layers, given.dry)
