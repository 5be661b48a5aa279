#!/usr/bin/env bash
# lab-audio check-health on hosts, side by side: check-health.sh [--json] [HOST...]; without a host, here.
# Ends with the worst of their exit codes: 0 all is good, 1 warnings, 2 something fails or a host cannot be reached.
set -u
options=
[ "${1:-}" != --json ] || { options=--json; shift; }
ask="as=; [ \"\$(id -u)\" = 0 ] || as='sudo -n'; exec \$as lab-audio check-health $options"
[ $# -gt 0 ] || exec sh -c "$ask"

said=$(mktemp -d)
trap 'rm -rf "$said"' EXIT
place=0
for host; do
    place=$((place + 1))
    { ssh -o BatchMode=yes -o ConnectTimeout=5 -- "$host" "$ask" >"$said/$place" 2>&1 </dev/null; echo $? >"$said/$place.code"; } &
done
wait
worst=0 place=0
for host; do
    place=$((place + 1))
    code=$(cat "$said/$place.code")
    [ -n "$options" ] || printf '== %s\n' "$host"
    cat "$said/$place"
    [ "$code" -le 2 ] || code=2
    [ "$code" -le "$worst" ] || worst=$code
done
exit "$worst"
