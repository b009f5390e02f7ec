#!/usr/bin/env bash
# Make .venv/ray: Ray, and what it needs beside the tests' environment, which it sees too. torch is not
# installed twice, and Ray changes no version that the service is tested with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

wanted=tests/cluster/requirements.txt
place=.venv/ray
if [ "$place/.made" -nt "$wanted" ] && [ "$place/.made" -nt .venv/.test ]; then
    exit 0
fi
rm -rf "$place"
.venv/bin/python -m venv "$place"
# Paths of a .pth come after the environment's own packages. The first line is the service and its
# tests, since the file that makes an installation editable is read in its own environment only.
"$place/bin/python" - "$PWD" "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'PYTHON'
import sys, sysconfig
from pathlib import Path
Path(sysconfig.get_path("purelib"), "service.pth").write_text("\n".join(sys.argv[1:]) + "\n")
PYTHON
"$place/bin/pip" install --quiet --disable-pip-version-check \
    --constraint requirements-test.lock --requirement "$wanted"
touch "$place/.made"
