# docker build -t escaip . && docker run --rm -v "$PWD:/data" escaip md example:organic example:ethanol --out run.extxyz
# apptainer build escaip.sif docker-daemon://escaip:latest && apptainer run --nv escaip.sif info
FROM python:3.11-slim
# The C++ kernels are compiled when they are first used.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml hatch_build.py constraints.txt README.md LICENSE ./
COPY escaip escaip
COPY configs configs
COPY datasets datasets
COPY md md
RUN pip install --no-cache-dir --constraint constraints.txt .
WORKDIR /data
ENTRYPOINT ["escaip"]
