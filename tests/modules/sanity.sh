#!/usr/bin/env bash
# ansible-test sanity on the collection as it is built and installed, with nothing ignored.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
checkout=$PWD
work=$(mktemp -d) # outside of any git checkout: there ansible-test looks at what git knows only
trap 'rm -rf "$work"' EXIT
# ansible-test keeps its environments in the home directory
export HOME=$checkout/.cache/home PATH=$checkout/.venv/bin:$PATH LC_ALL=C.UTF-8 PIP_DISABLE_PIP_VERSION_CHECK=1
say_if_failed() { "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }; }

mkdir -p "$HOME/.ansible/test/cache"
for pip in 24_2 25_2; do cp tests/modules/get_pip.py "$HOME/.ansible/test/cache/get_pip_$pip.py"; done
cd "$work" # away from ansible.cfg, by which the checkout is installed already
say_if_failed ansible-galaxy collection build --output-path "$work" "$checkout"
say_if_failed ansible-galaxy collection install --offline -p "$work" "$work"/lab-audio-*.tar.gz
cd ansible_collections/lab/audio
ansible-test sanity --local --color no --python "$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')" >"$work/log" 2>&1 || {
    grep -E '^(ERROR|FATAL)' "$work/log" >&2 || tail -n 30 "$work/log" >&2
    exit 1
}
tests=$(grep -c '^Running sanity test' "$work/log") || { cat "$work/log" >&2; exit 1; }
echo "$tests sanity tests, nothing ignored"
