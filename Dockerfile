# The monitor, the dashboard and the sample job of docker-compose.yml: `gradwatch VERB …`.
FROM python:3.11.9-slim-bookworm

# Where torch without CUDA is to be had, as --build-arg PIP_EXTRA_INDEX_URL=…
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY agent agent
COPY monitor monitor
COPY dashboards dashboards
RUN pip install --constraint constraints.txt '.[demo,postgres]'

RUN useradd --uid 1000 --create-home gradwatch && install -d -o gradwatch /rings
USER gradwatch
WORKDIR /home/gradwatch

# The database's password is a file: it shows in no command line and in no `docker inspect`.
ENTRYPOINT ["sh", "-c", "PGPASSWORD=$(cat /run/secrets/postgres_password 2>/dev/null) && export PGPASSWORD; exec gradwatch \"$@\"", "gradwatch"]
