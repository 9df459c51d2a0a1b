#!/bin/sh
# First start: a cluster with one superuser, its password and one database. Then the command.
set -eu
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    passwords=$(mktemp)
    printf '%s\n' "$(cat "${POSTGRES_PASSWORD_FILE:?}")" >"$passwords"
    initdb --username="${POSTGRES_USER:=postgres}" --pwfile="$passwords" --auth-host=scram-sha-256 --auth-local=trust
    rm "$passwords"
    pg_ctl -w -o "-c listen_addresses=" start
    createdb --username="$POSTGRES_USER" --maintenance-db=postgres "${POSTGRES_DB:-$POSTGRES_USER}"
    pg_ctl -w stop
    printf 'host all all all scram-sha-256\n' >>"$PGDATA/pg_hba.conf"
    printf "listen_addresses = '*'\n" >>"$PGDATA/postgresql.conf"
fi
exec "$@"
