#!/usr/bin/env bash
# The scenarios, with the collection as it is built and installed: run.sh test --all, run.sh converge -s redis, ...
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
exec molecule --base-config molecule/config.yml "$@"
