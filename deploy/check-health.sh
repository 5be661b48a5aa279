#!/usr/bin/env bash
# lab-audio check-health on hosts, side by side: check-health.sh [--json] [HOST...]; without a host, here.
# With --json each host that answers is a document on a line of its own. What ssh and sudo say goes to stderr.
# Ends with the worst of their exit codes: 0 all is good, 1 warnings, 2 something fails or a host cannot be asked.
set -u
options=
[ "${1:-}" != --json ] || { options=--json; shift; }
ask="as=; [ \"\$(id -u)\" = 0 ] || { as='sudo -n'; \$as lab-audio --version >/dev/null || exit 2; }
exec \$as lab-audio check-health $options"
[ $# -gt 0 ] || exec sh -c "$ask"

said=$(mktemp -d)
trap 'rm -rf "$said"' EXIT
place=0
for host; do
    place=$((place + 1))
    {
        timeout 20 ssh -o BatchMode=yes -o ConnectTimeout=5 -o ServerAliveInterval=3 -o ServerAliveCountMax=2 -- \
            "$host" "$ask" >"$said/$place" 2>"$said/$place.errors" </dev/null
        echo $? >"$said/$place.code"
    } &
done
wait
worst=0 place=0
for host; do
    place=$((place + 1))
    code=$(cat "$said/$place.code")
    if [ -z "$options" ]; then
        printf '== %s\n' "$host"
        cat "$said/$place"
    elif [ -s "$said/$place" ]; then
        tr -d '\n' <"$said/$place"
        echo
    fi
    sed "s|^|$host: |" "$said/$place.errors" >&2
    [ "$code" != 124 ] || echo "$host: no answer" >&2
    [ "$code" -le 2 ] || code=2
    [ "$code" -le "$worst" ] || worst=$code
done
exit "$worst"
