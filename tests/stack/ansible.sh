#!/usr/bin/env bash
# Make .cache/ansible from its locks: ansible-lint, antsibull-docs and molecule, which want other versions of what .venv
# has, and the collections that ours needs. Quick when nothing changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tools=.cache/ansible tmp=.cache/tmp/collections
locks=(tests/stack/locks/ansible.txt tests/stack/locks/collections.txt)
mkdir -p .cache/tmp
exec 9>.cache/ansible.lock
flock 9
cat "${locks[@]}" | cmp -s - $tools/lock && exit
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore TMPDIR=$PWD/.cache/tmp
.venv/bin/python -m venv --clear $tools
$tools/bin/pip install -qq --no-deps -r "${locks[0]}"
# Galaxy has no lock files; on PyPI the same collections come in one package.
mapfile -t lines < <(grep -v '^#' "${locks[1]}")
rm -rf $tmp
$tools/bin/pip download -qq --no-deps -d $tmp "${lines[0]}"
$tools/bin/python - $tmp $tools/collections "${lines[@]:1}" <<'PYTHON'
import sys, zipfile
from pathlib import Path
wheels, target, *collections = sys.argv[1:]
with zipfile.ZipFile(next(Path(wheels).glob("*.whl"))) as wheel:
    wanted = tuple(f"ansible_collections/{name}/" for name in collections)
    wheel.extractall(target, [name for name in wheel.namelist() if name.startswith(wanted)])
PYTHON
rm -rf $tmp
cat "${locks[@]}" >$tools/lock
