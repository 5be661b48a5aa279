#!/usr/bin/env bash
# The scenarios, with the collection as it is built and installed: `run.sh all`, two at a time; or as molecule has it:
# run.sh test -s redis, run.sh converge -s redis, ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tests/stack/ansible.sh
work=.cache/molecule tools=$PWD/.cache/ansible
rm -rf $work/collections
mkdir -p $work/collections
export PATH=$tools/bin:$PATH ANSIBLE_HOME=$PWD/$work/home LC_ALL=C.UTF-8
export ANSIBLE_COLLECTIONS_PATH=$PWD/$work/collections:$tools/collections LAB_HOSTS=$PWD/.cache/hosts/runs
# away from ansible.cfg, by which the checkout is installed already
checkout=$PWD
(
    cd $work
    rm -f lab-audio-*.tar.gz
    ansible-galaxy collection build --output-path . "$checkout"
    ansible-galaxy collection install --offline --no-deps -p collections lab-audio-*.tar.gz
) >$work/build.log 2>&1 || { cat $work/build.log >&2; exit 1; }
[ "$*" = all ] || exec molecule --base-config molecule/config.yml "$@"

proven() { # SCENARIO: all that it said is shown if it fails
    local log=.cache/molecule/$1.log
    if molecule --base-config molecule/config.yml test -s "$1" >$log 2>&1 </dev/null; then
        echo "$1 passed after $SECONDS s"
    else
        cat $log && echo "$1 FAILED" && return 1
    fi
}
export -f proven
printf '%s\n' molecule/*/molecule.yml | cut -d/ -f2 | xargs -P2 -I{} bash -c 'proven {}'
