# The command line in an image, for CPUs:
#   docker build -t uqff .
#   docker run --rm -v "$PWD:/data" uqff inspect model
#   docker run --rm -v "$PWD:/data" -v uqff-cache:/cache -e HF_TOKEN uqff run owner/name:q4k --prompt Hello
FROM python:3.12-slim

# Wheels of torch without CUDA; everything else comes from PyPI.
COPY pyproject.toml README.md LICENSE /src/
COPY uqff /src/uqff
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu "/src[run,hub]" && rm -rf /src

# The hub's cache and compiled kernels outlive a container if /cache is a volume.
ENV HF_HOME=/cache/huggingface NUMBA_CACHE_DIR=/cache/numba
RUN mkdir -m 1777 /cache /data
WORKDIR /data
ENTRYPOINT ["uqff"]
CMD ["--help"]
