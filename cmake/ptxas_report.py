"""Compiler launcher of the CUDA files: runs nvcc and keeps what ptxas says of registers and spills.

Usage: ptxas_report.py nvcc ARGUMENTS...   (CMake's CUDA_COMPILER_LAUNCHER)
The report is written beside the object file; python_tests/test_cuda_resources.py reads it.
"""

import subprocess
import sys
from pathlib import Path


def main(command: list[str]) -> int:
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    lines = result.stderr.splitlines(keepends=True)
    report = [line for line in lines if line.startswith("ptxas info") or "bytes stack frame" in line]
    sys.stderr.writelines(line for line in lines if line not in report)
    if "-o" in command:
        Path(command[command.index("-o") + 1] + ".ptxas").write_text("".join(report))
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
