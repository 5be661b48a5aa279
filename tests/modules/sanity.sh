#!/usr/bin/env bash
# The collection as it is built and installed, with nothing ignored: ansible-test sanity, ansible-lint, antsibull-docs.
# sanity.sh BIN PYTHON: only ansible-test, by the ansible-core of this directory and this version of Python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
checkout=$PWD bin=${1:-$PWD/.venv/bin}
python=${2:-$("$bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
work=$(mktemp -d) # outside of any git checkout: there ansible-test looks at what git knows only
trap 'rm -rf "$work"' EXIT
# ansible-test keeps its environments in the home directory
export HOME=$checkout/.cache/home PATH=$bin:$PATH LC_ALL=C.UTF-8 PIP_DISABLE_PIP_VERSION_CHECK=1
say_if_failed() { "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }; }

mkdir -p "$HOME/.ansible/test/cache"
for pip in 23_1_2 24_2 25_2 26_0; do cp tests/modules/get_pip.py "$HOME/.ansible/test/cache/get_pip_$pip.py"; done
cd "$work" # away from ansible.cfg, by which the checkout is installed already
say_if_failed ansible-galaxy collection build --output-path "$work" "$checkout"
say_if_failed ansible-galaxy collection install --offline --no-deps -p "$work" "$work"/lab-audio-*.tar.gz
cd ansible_collections/lab/audio
ansible-test sanity --local --color no --python "$python" >"$work/log" 2>&1 || {
    grep -E '^(ERROR|FATAL)' "$work/log" >&2 || tail -n 30 "$work/log" >&2
    exit 1
}
tests=$(grep -c '^Running sanity test' "$work/log") || { cat "$work/log" >&2; exit 1; }
echo "$tests sanity tests, nothing ignored"
[ $# = 0 ] || exit 0

say_if_failed "$checkout/tests/stack/ansible.sh"
export PATH=$checkout/.cache/ansible/bin:$PATH ANSIBLE_COLLECTIONS_PATH=$work:$checkout/.cache/ansible/collections
cp -r "$checkout/molecule" . # not part of the collection, but looked at with it
say_if_failed ansible-lint --offline --nocolor --strict --profile production
grep -h '^Passed' "$work/log" | sed 's/^/ansible-lint: /'
say_if_failed antsibull-docs lint-collection-docs --plugin-docs .
echo "antsibull-docs: passed"
