#!/bin/sh
# Records the binary interface of released UCX versions: `record.sh CHECKOUT > layouts.txt`, CHECKOUT being a git clone of
# https://github.com/openucx/ucx with its tags. One line for each struct, field and constant of probe.c, one column for each version;
# `-` = not there yet. A version that changes what src/lib.rs relies on shows in the test `recorded_layouts`.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
checkout=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
versions="1.13.1 1.14.1 1.15.0 1.16.0 1.17.0 1.18.1 1.19.1 1.20.1 1.21.0 1.22.0"
for version in $versions; do
    mkdir -p "$work/$version"
    git -C "$checkout" archive "v$version" src/ucp/api src/ucs src/uct/api | tar -x -C "$work/$version"
    major=${version%%.*} rest=${version#*.}
    sed "s/@MAJOR_VERSION@/$major/g; s/@MINOR_VERSION@/${rest%%.*}/g" \
        "$work/$version/src/ucp/api/ucp_version.h.in" >"$work/$version/src/ucp/api/ucp_version.h"
    cc -I "$work/$version/src" -o "$work/probe" "$here/probe.c"
    "$work/probe" >"$work/$version.txt"
done
printf 'version %s\n' "$versions"
newest=${versions##* }
sed 's/ [^ ]*$//' "$work/$newest.txt" | while read -r name; do
    printf '%s' "$name"
    for version in $versions; do
        value=$(awk -v name="$name" 'BEGIN { n = length(name) } substr($0, 1, n + 1) == name " " { print substr($0, n + 2) }' "$work/$version.txt")
        printf ' %s' "${value:--}"
    done
    printf '\n'
done
