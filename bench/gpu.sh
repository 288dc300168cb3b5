#!/usr/bin/env bash
# All that a machine with an NVIDIA GPU can tell about this package, in under nine minutes: see bench/gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -u bench/gpu.py "$@"
