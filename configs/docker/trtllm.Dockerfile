# Baton in NVIDIA's image with Triton, torch and TensorRT-LLM: workers with engine trtllm (and, on one host, all the rest).
#   docker build -f configs/docker/trtllm.Dockerfile -t baton-trtllm:0.1.0 .
#   docker run --rm --gpus all --shm-size=2g -p 9000:9000 -v /path/to/hf-model:/models/model:ro baton-trtllm:0.1.0
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3
FROM ${TRITON_IMAGE}

WORKDIR /opt/baton
COPY requirements-container.txt ./
RUN /opt/venv-tritonserver/bin/python -m pip install --no-cache-dir -r requirements-container.txt

COPY . .
ENV BATON_CACHE=/var/cache/baton
EXPOSE 9000 8000 8001 8002 7000 7100
CMD ["/opt/baton/scripts/serve", "--config", "/opt/baton/configs/trtllm-1p1d.yaml", "--address", "0.0.0.0"]
