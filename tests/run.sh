#!/usr/bin/env bash
# Lint, types and all tests on a fresh machine with Python 3.10 to 3.12 and pip.
#   bash tests/run.sh            everything that needs no WebUI
#   WEBUI_DIR=… bash tests/run.sh   the tests in a real WebUI as well; FORGE_DIR, REFORGE_DIR, NEO_DIR and
#   CLASSIC_DIR name forks, NEIGHBOURS_DIR a folder with other extensions
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1

if [ ! -e .venv/ready ]; then
  "$python" -m venv --clear .venv
  .venv/bin/pip install -q "torch==2.13.0" -r tests/requirements.txt
  .venv/bin/pip install -q --no-deps "stable-diffusion-sdkit==2.1.5"
  touch .venv/ready
fi
has_diffusers=$("$python" -c 'import sys; print(int(sys.version_info >= (3, 11)))')  # its newest need 3.11
if [ "$has_diffusers" = 1 ] && [ ! -e .venv-diffusers/ready ]; then
  "$python" -m venv --clear .venv-diffusers
  .venv-diffusers/bin/pip install -q "torch==2.13.0" -r tests/requirements-diffusers.txt
  touch .venv-diffusers/ready
fi
if [ ! -e .venv-page/ready ]; then
  "$python" -m venv --clear .venv-page
  .venv-page/bin/pip install -q "torch==2.13.0" -r tests/requirements-page.txt
  touch .venv-page/ready
fi

.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest -q --ignore-glob="tests/oracles/test_diffusers*.py" --ignore=tests/webui \
  --ignore=tests/neighbours --ignore=tests/demo/test_page.py
if command -v chromium chromium-browser google-chrome >/dev/null; then
  BROWSER_TESTS=1 .venv-page/bin/python -m pytest -q tests/demo/test_page.py
else
  echo "no chromium: the demo's page was not tried in a browser"
fi
if [ -n "${WEBUI_DIR:-}" ]; then
  .venv-page/bin/python -m pytest -q tests/webui
else
  echo "WEBUI_DIR is not set: the tests in a real WebUI did not run"
fi
if [ -n "${WEBUI_DIR:-}" ] && [ -n "${NEIGHBOURS_DIR:-}" ]; then
  .venv-page/bin/python -m pytest -q tests/neighbours
else
  echo "WEBUI_DIR and NEIGHBOURS_DIR are not both set: the tests beside other extensions did not run"
fi
if [ "$has_diffusers" = 1 ]; then
  .venv-diffusers/bin/python -m pytest -q tests/oracles/test_diffusers*.py
else
  echo "Python 3.10: diffusers' pipelines, which need 3.11, were not compared with"
fi
