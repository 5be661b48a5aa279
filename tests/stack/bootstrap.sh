#!/usr/bin/env bash
# Make this checkout's .venv from the lock files: bootstrap.sh demo|test. Quick when nothing changed.
# As root, Debian packages that are missing are installed; for anybody else they are named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
profile=${1:?usage: bootstrap.sh demo|test}
locks=tests/stack/locks

say() { printf '%s\n' "$*"; }
die() { printf '%s\n' "$*" >&2; exit 1; }

mkdir -p .cache/tmp
export TMPDIR=$PWD/.cache/tmp PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1
exec 9>.cache/bootstrap.lock
flock 9

apt_install() {
    local policy=/usr/sbin/policy-rc.d own=
    # Debian starts what it installs; nothing here wants a system service.
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy" && own=1
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    say "Installing Debian packages: $*"
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@"; } \
        >.cache/apt.log 2>&1 </dev/null || { tail -n 15 .cache/apt.log >&2; say "apt-get failed; its log is .cache/apt.log"; }
    if [ -n "$own" ]; then rm -f "$policy"; trap - EXIT; fi
}

# want PACKAGE... : install them as root, else print the command.
want() {
    [ $# -gt 0 ] || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt_install "$@"
    else
        say "Not installed here: $*"
        say "  as root:  apt-get install --no-install-recommends $*"
    fi
}

python_ok() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if python_ok "$candidate"; then "$candidate" -c 'import sys; print(sys.executable)'; return; fi
    done
    return 1
}

missing=()
if [ "$profile" = test ]; then
    declare -A program=(
        [swift-proxy]=swift-proxy-server [swift-account]=swift-account-server [swift-container]=swift-container-server
        [swift-object]=swift-object-server [memcached]=memcached [openssh-server]=sshd [openssh-client]=ssh
        [ffmpeg]=ffmpeg [openssl]=openssl [espeak-ng]=espeak-ng
        [xfsprogs]=mkfs.xfs [btrfs-progs]=mkfs.btrfs [lvm2]=pvcreate [cryptsetup-bin]=cryptsetup [fdisk]=sfdisk
        [rsync]=rsync [bubblewrap]=bwrap [mmdebstrap]=mmdebstrap [systemd-container]=systemd-nspawn [nftables]=nft [iproute2]=ip
    )
    for package in "${!program[@]}"; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${program[$package]}" >/dev/null || missing+=("$package")
    done
fi
python=$(find_python) || die "Python 3.11, 3.12 or 3.13 is needed. On Debian or Ubuntu: apt-get install python3 python3-venv (or set PYTHON=/path/to/python3)"
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    missing+=("python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv")
fi
want "${missing[@]}"
"$python" -c 'import ensurepip, venv' 2>/dev/null || die "$python cannot make virtual environments without the package named above."

stamp() { { "$python" -VV; pwd; cat "$@"; } | sha256sum; }
demo_stamp=$(stamp "$locks/demo.txt")
worker_stamp=$(stamp worker_src/pyproject.toml)
test_stamp=$(stamp "$locks/demo.txt" "$locks/test.txt")
current() { [ "$(cat ".venv/.$1" 2>/dev/null)" = "$2" ] && [ -x .venv/bin/python ]; }
size() { sed -n "s/^$1=//p" "$locks/sizes.txt"; }

if ! current demo "$demo_stamp"; then
    pins=$(mktemp)
    trap 'rm -f "$pins"' EXIT
    say "Making .venv with $("$python" -V)."
    rm -rf .venv
    "$python" -m venv .venv
    torch=$(grep '^torch==' "$locks/demo.txt")
    # PyPI's torch for x86-64 is the CUDA build; pip finds a CPU build only where it has been told of one.
    if [ "$(uname -m)" != x86_64 ] || .venv/bin/pip index versions torch 2>/dev/null | grep -qF "${torch#torch==}+cpu"; then
        say "Downloading $(size demo-cpu): Whisper and its libraries, torch for the CPU, the three servers."
        .venv/bin/pip install -qq --no-deps -r "$locks/demo.txt"
    else
        say "Downloading $(size demo-cuda): pip knows no CPU build of ${torch/==/ }, so its CUDA build comes with its libraries."
        say "  (much less with a CPU index of torch in PIP_EXTRA_INDEX_URL, or its wheel in PIP_FIND_LINKS)"
        .venv/bin/pip install -qq -c "$locks/demo.txt" "$torch"
        grep -v '^torch==' "$locks/demo.txt" >"$pins"
        .venv/bin/pip install -qq --no-deps -r "$pins"
    fi
    # PyPI's torchaudio is linked to CUDA and dies beside a CPU torch; without these files it is pure Python, which does.
    if .venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then
        rm -f .venv/lib/python3.*/site-packages/torchaudio/lib/*.so
    fi
    printf '%s' "$demo_stamp" >.venv/.demo
fi
if ! current worker "$worker_stamp"; then
    .venv/bin/pip install -qq --no-deps --no-build-isolation -e worker_src
    printf '%s' "$worker_stamp" >.venv/.worker
fi

if [ "$profile" = test ] && ! current test "$test_stamp"; then
    say "Downloading $(size test): test tools."
    .venv/bin/pip install -qq --no-deps -r "$locks/test.txt"
    printf '%s' "$test_stamp" >.venv/.test
fi
