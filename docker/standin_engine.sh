#!/usr/bin/env bash
# A private Docker engine for machines that have none: `standin_engine.sh start DIR` and `… stop DIR`.
#
# Everything it owns lies in DIR (data, socket, pidfile, log), so `stop` leaves nothing behind: the daemon by its
# pidfile, then the firewall chains and the bridge it made. Needs root on Debian or Ubuntu. Never started beside
# another engine, because both would write the same firewall chains.
set -euo pipefail

BRIDGE_ADDRESS=192.168.231.1/24

start() {
    local dir=$1
    if pgrep -x dockerd >/dev/null; then
        echo "a Docker engine runs already, but this user cannot talk to it" >&2
        return 1
    fi
    if ! command -v dockerd >/dev/null || ! command -v iptables >/dev/null; then
        apt-get update -qq
        # policy-rc.d 101: the package must not start the system's own engine.
        if [ ! -e /usr/sbin/policy-rc.d ]; then
            printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
            chmod +x /usr/sbin/policy-rc.d
            trap 'rm -f /usr/sbin/policy-rc.d' RETURN
        fi
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends docker.io iptables >/dev/null
    fi
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
    return 1
}

stop() {
    local dir=$1 pid policy
    [ -e "$dir/daemon.json" ] || return 0
    pid=$(cat "$dir/dockerd.pid" 2>/dev/null || true)
    if [ -n "$pid" ]; then
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 150); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.2
        done
    fi
    # Every chain and rule of the engine names DOCKER or its bridge.
    iptables-save | grep -vE 'DOCKER|docker0' | iptables-restore
    policy=$(cat "$dir/forward_policy.before" 2>/dev/null || true)
    [ -z "$policy" ] || iptables -P FORWARD "$policy"
    [ ! -s "$dir/ip_forward.before" ] || cat "$dir/ip_forward.before" >/proc/sys/net/ipv4/ip_forward
    ip link delete docker0 2>/dev/null || true
    { grep -F " $dir/" /proc/mounts || true; } | awk '{print $2}' | sort -r | xargs -r -n 1 umount -l
    rm -rf "${dir:?}"
}

case "${1:-} ${2:-}" in
"start "/*) start "$2" ;;
"stop "/*) stop "$2" ;;
*)
    echo "usage: $0 start|stop ABSOLUTE_DIR" >&2
    exit 2
    ;;
esac
