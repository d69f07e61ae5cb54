"""Benchmarks. Each module is a command: `.venv/bin/python -m scripts.bench.NAME --help`."""
