"""Check a wheel's file list and size: all code and content, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

LIMIT = 35 * 2**20  # bytes: the weights of all priors are held to 30 MiB

wheel = Path(sys.argv[1])
with zipfile.ZipFile(wheel) as archive:
    found = {i.filename for i in archive.infolist() if ".dist-info/" not in i.filename}
tracked = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True, text=True).stdout.split("\0")
code = {p for p in tracked if p.startswith("invdiff/")}
content = {f"invdiff/_catalogue/{p}" for p in tracked if p.startswith(("problems/", "priors/", "data/"))}
missing, extra = sorted((code | content) - found), sorted(found - code - content)
if missing or extra:
    sys.exit(f"{wheel.name}: missing {missing}, not tracked {extra}")
if any(p.startswith("invdiff/_catalogue/") and p.endswith(".py") for p in found):
    sys.exit(f"{wheel.name}: the catalogue holds Python")
size = wheel.stat().st_size
if size > LIMIT:
    sys.exit(f"{wheel.name}: {size / 2**20:.1f} MiB, more than {LIMIT / 2**20:.0f}")
print(f"{wheel.name}: {len(found)} files, {size / 2**20:.1f} MiB")
