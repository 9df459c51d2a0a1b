#!/usr/bin/env bash
# A private Docker engine for machines that have none: `standin_engine.sh start DIR` and `… stop DIR`.
#
# Everything it owns lies in DIR. `stop` ends the daemon by its pidfile, takes away the firewall rules, bridges and
# mounts it made, and keeps only DIR/data: images and layers, so that the next start is warm. Needs root on Debian or
# Ubuntu. Never started beside another engine, because both would write the same firewall chains.
set -euo pipefail

BRIDGE_ADDRESS=192.168.231.1/24

start() {
    local dir=$1
    if docker -H "unix://$dir/docker.sock" version >/dev/null 2>&1; then
        return 0 # left by a run that was killed
    fi
    if pgrep -x dockerd >/dev/null; then
        echo "a Docker engine runs already, but this user cannot talk to it" >&2
        return 1
    fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "no Docker engine answers; starting one of our own needs root on Debian or Ubuntu" >&2
        return 1
    fi
    install_engine
    mkdir -p "$dir"
    cat /proc/sys/net/ipv4/ip_forward >"$dir/ip_forward.before"
    iptables -S FORWARD | awk '$1 == "-P" {print $3}' >"$dir/forward_policy.before"
    # The file limit: some init systems hand on an infinite one, which makes programs that close "all" files crawl.
    cat >"$dir/daemon.json" <<JSON
{
  "data-root": "$dir/data",
  "exec-root": "$dir/exec",
  "pidfile": "$dir/dockerd.pid",
  "hosts": ["unix://$dir/docker.sock"],
  "storage-driver": "overlay2",
  "bip": "$BRIDGE_ADDRESS",
  "features": {"buildkit": true},
  "default-ulimits": {"nofile": {"Name": "nofile", "Hard": 20000, "Soft": 20000}}
}
JSON
    # setsid: an interrupt at the terminal must not end the engine before its containers are taken down.
    setsid dockerd --config-file "$dir/daemon.json" >"$dir/dockerd.log" 2>&1 </dev/null &
    local pid=$!
    for _ in $(seq 150); do
        docker -H "unix://$dir/docker.sock" version >/dev/null 2>&1 && return 0
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.2
    done
    echo "the engine did not start:" >&2
    tail -n 20 "$dir/dockerd.log" >&2
    stop "$dir"
    return 1
}

install_engine() {
    if command -v dockerd >/dev/null && command -v docker >/dev/null && command -v iptables >/dev/null; then
        return 0
    fi
    apt-get update -qq
    local policy=/usr/sbin/policy-rc.d ours=
    if [ ! -e "$policy" ]; then
        # 101: the package must not start the system's own engine.
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
        ours=1
    fi
    local status=0
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends docker.io iptables >/dev/null ||
        status=$?
    [ -z "$ours" ] || rm -f "$policy"
    return "$status"
}

stop() {
    local dir=$1 pid policy
    [ -e "$dir/daemon.json" ] || return 0
    export DOCKER_HOST="unix://$dir/docker.sock"
    # Containers and networks first: the daemon would leave their bridges behind.
    docker ps --all --quiet 2>/dev/null | xargs -r docker rm --force --volumes >/dev/null || true
    docker network prune --force >/dev/null 2>&1 || true
    docker volume ls --quiet 2>/dev/null | xargs -r docker volume rm >/dev/null || true
    pid=$(cat "$dir/dockerd.pid" 2>/dev/null || true)
    if [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ]; then
        kill "$pid"
        for _ in $(seq 150); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.2
        done
    fi
    # Every chain and rule of the engine names DOCKER or one of its bridges.
    iptables-save | grep -vE 'DOCKER|docker0|br-[0-9a-f]{12}' | iptables-restore
    policy=$(cat "$dir/forward_policy.before" 2>/dev/null || true)
    [ -z "$policy" ] || iptables -P FORWARD "$policy"
    [ ! -s "$dir/ip_forward.before" ] || cat "$dir/ip_forward.before" >/proc/sys/net/ipv4/ip_forward
    ip link delete docker0 2>/dev/null || true
    awk -v below="$dir/" 'index($2, below) == 1 {print $2}' /proc/mounts | sort -r | xargs -r -n 1 umount -l
    find "${dir:?}" -mindepth 1 -maxdepth 1 ! -name data -exec rm -rf {} +
}

case "${1:-} ${2:-}" in
"start "/*) start "$2" ;;
"stop "/*) stop "$2" ;;
*)
    echo "usage: $0 start|stop ABSOLUTE_DIR" >&2
    exit 2
    ;;
esac
