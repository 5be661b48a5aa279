#!/usr/bin/env bash
# The collection on the oldest and the newest ansible-core, and its modules by the oldest Python of a host: `make compat`.
# python3.9 and python3.12 (or newer, as the newest ansible-core wants it) have to be there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p .cache/compat
works() { "$1" -c "" 2>/dev/null; }
oldest=python3.9 newer=python3.12
works $newer || newer=python3.13
for python in $oldest $newer; do
    works $python || { echo "make compat needs python3.9, and python3.12 or python3.13, on PATH: $python does not run" >&2; exit 1; }
done

made() { # made NAME PYTHON REQUIREMENT... : an environment; made anew each time, as the newest of all is what is asked for
    "$2" -m venv --clear ".cache/compat/$1"
    ".cache/compat/$1/bin/pip" install -qq --disable-pip-version-check "${@:3}"
}

made host "$oldest" 'boto3>=1.36' redis psycopg2-binary coverage
site=$(echo .cache/compat/host/lib/python3*/site-packages)
for wanted in 'ansible-core==2.17.*' ansible-core; do
    made core "$newer" "$wanted" psycopg2-binary redis boto3
    core=$(.cache/compat/core/bin/python -c 'import ansible.release; print(ansible.release.__version__)')
    python=$(.cache/compat/core/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "== ansible-core $core, Python $python"
    tests/modules/sanity.sh "$PWD/.cache/compat/core/bin" "$python"
    # A host gets the modules' half of ansible-core only.
    ln -sfn "$(echo "$PWD"/.cache/compat/core/lib/python3*/site-packages/ansible)" "$site/ansible"
    echo "== modules of ansible-core $core by $("$oldest" -V)"
    MODULE_PYTHON=$PWD/.cache/compat/host/bin/python .venv/bin/python -m pytest -q -n2 --dist=loadfile tests/modules "$@"
done
