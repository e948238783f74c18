"""Make the shared image's own package importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "roles" / "images" / "files" / "dagster"))
sys.dont_write_bytecode = True
