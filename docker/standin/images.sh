#!/usr/bin/env bash
# Images for an engine that cannot pull any: `images.sh BASE POSTGRES REDIS` makes what is missing under these names.
#
# The base is what `python:3.11-slim-bookworm` is: Debian 12 with Python 3.11 and pip under /usr/local/bin, plus the
# certificates that this machine trusts. The other two take the command, user, environment and volumes that the
# compose file gives the official ones. Only for an engine of one's own: the names are those of the official images.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

missing() {
    ! docker image inspect "$1" >/dev/null 2>&1
}

base() {
    local root
    root=$(mktemp -d)
    # shellcheck disable=SC2064 # expanded now: `root` is gone by then
    trap "rm -rf '$root'" EXIT
    if ! command -v debootstrap >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends debootstrap >/dev/null
    fi
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv bookworm "$root" >/dev/null
    cp "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" "$root/etc/ssl/certs/ca-certificates.crt"
    ln -s /usr/bin/python3 "$root/usr/local/bin/python"
    ln -s /usr/bin/pip3 "$root/usr/local/bin/pip"
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
    tar -C "$root" --numeric-owner -c . | docker import \
        --change 'ENV LANG=C.UTF-8' \
        --change 'ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt' \
        --change 'ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt' \
        --change 'CMD ["python"]' - "$1" >/dev/null
    rm -rf "$root"
}

build() {
    docker build --quiet --network host --build-arg "BASE_IMAGE=$2" --tag "$3" \
        --file "$here/$1.Dockerfile" "$here" >/dev/null
}

if [ $# != 3 ]; then
    echo "usage: $0 BASE POSTGRES REDIS" >&2
    exit 2
fi
if missing "$1"; then base "$1"; fi
# Always: what lies beside this file may have changed, and an unchanged layer costs nothing.
build postgres "$1" "$2"
build redis "$1" "$3"
