#!/usr/bin/env bash
# The main job: set up, then fine-tune a model on tool calls and show what it learned.
#   bash scripts/demo.sh                        a small random model; minutes on two CPU cores
#   bash scripts/demo.sh --model PATH           a local checkpoint
#   bash scripts/demo.sh --help                 all options
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repository=$PWD
bash scripts/setup.sh
# Paths on the command line are relative to where the script was called.
cd "$here"
PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}" exec "$repository/.venv/bin/python" -m unsloth_patches demo "$@"
