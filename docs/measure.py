"""Writes docs/data/smollm2.csv, the numbers behind the maps of the documentation, from a saved profile.

python docs/measure.py profiles/smollm2
"""

import sys
from pathlib import Path

import foveate

TARGET = Path(__file__).parent / "data" / "smollm2.csv"


def main(folder: str) -> None:
    profile = foveate.Profile.load(folder)
    wide = profile.heads.pivot_table(index=["layer", "head"], columns="metric", values="value")
    # three figures are more than a shade of green can show
    lines = wide.reset_index().to_csv(index=False, float_format="%.3g", lineterminator="\n")
    info = profile.info
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(f"# {info['model']}, {info['tokens']} tokens; python docs/measure.py {folder}\n{lines}")
    print(f"{TARGET.name}: {len(wide)} heads, {wide.shape[1]} numbers each")


if __name__ == "__main__":
    main(*sys.argv[1:])
