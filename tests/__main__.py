"""All tests, in two processes: python tests [options of pytest]"""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# About half of the work. Those that share the trained run of conftest.py are all here.
HALF = {FOLDER / f"test_{name}.py" for name in ("layout", "lesions", "predict", "readme", "train")}

jobs = []
for files in HALF, {*FOLDER.glob("test_*.py")} - HALF:
    command = [sys.executable, "-m", "pytest", *sorted(files), *sys.argv[1:]]
    jobs.append(subprocess.Popen(command, cwd=FOLDER.parent, stdout=subprocess.PIPE))
for job in jobs:
    print(job.communicate()[0].decode(), flush=True)
sys.exit(any(job.returncode for job in jobs))  # a killed one has a negative code
