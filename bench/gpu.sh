#!/usr/bin/env bash
# Tests and measures the kernels on this machine's GPU, in calls of at most 9 minutes. How: scripts/gpu/__main__.py.
exec "${PYTHON:-python3}" "$(dirname "$0")/../scripts/gpu" "$@"
