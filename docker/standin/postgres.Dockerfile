# Debian's PostgreSQL behind the official image's face: user, environment variables, data folder, command.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends postgresql >/dev/null \
    && rm -rf /var/lib/apt/lists/* /var/lib/postgresql/* \
    && ln -s /usr/lib/postgresql/*/bin/* /usr/local/bin/ \
    && install -d -o postgres -g postgres -m 0700 /var/lib/postgresql/data \
    && install -d -o postgres -g postgres -m 3777 /var/run/postgresql
ENV PGDATA=/var/lib/postgresql/data
COPY postgres_entrypoint.sh /usr/local/bin/
STOPSIGNAL SIGINT
ENTRYPOINT ["postgres_entrypoint.sh"]
CMD ["postgres"]
