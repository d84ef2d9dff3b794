#!/usr/bin/env bash
# Make .venv with everything the project needs: the pinned packages of requirements.lock and torch.
# Sourced or called by demo.sh and test.sh; does nothing when .venv is up to date.
#   PYTHON=python3.12 bash scripts/setup.sh     another interpreter (3.11 to 3.13)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
lock=scripts/requirements.lock
torch=torch==2.13.0
say() { printf '\033[1msetup:\033[0m %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

command -v "$python" >/dev/null || die "$python is not there. Install Python 3.11 to 3.13, or name one: PYTHON=/path/to/python bash $0"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
  die "$("$python" -V) is not supported by the pinned packages. Name Python 3.11 to 3.13: PYTHON=/path/to/python bash $0"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  die "$python has no venv module. On Debian and Ubuntu: apt-get install python3-venv"

# This checkout on .venv's path, as an editable install would put it; moved checkouts are found again.
link() { "$1" -c 'import sys, sysconfig; open(sysconfig.get_path("purelib") + "/unsloth_patches.pth", "w").write(sys.argv[1] + "\n")' "$PWD"; }

stamp="$torch $("$python" -V) $(cksum <"$lock")"
if [ "$(cat .venv/.setup-stamp 2>/dev/null)" = "$stamp" ]; then
  link .venv/bin/python
  exit 0
fi

say "virtual environment in .venv ($("$python" -V))"
"$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@"; }

log=$(mktemp)
trap 'rm -f "$log"' EXIT
# One line of progress for a hundred packages; what pip had to say only where it fails.
install() {
  local total=$1
  shift
  if ! pip install --no-deps "$@" 2>"$log" | awk -v n="$total" '
      /^(Collecting|Processing)/ { sub(".*/", "", $2); printf "\r  %3d of %d  %-40.40s", ++i, n, $2; fflush() }
      /^Installing/ { printf "\r  %-54s\r", "unpacking …"; fflush() }' >&2; then
    cat "$log" >&2
    die "pip could not install $*; see its message above (no network, or no wheel for this platform?)"
  fi
}

# pip takes what the configured index has: on a machine without an NVIDIA GPU, point it at PyTorch's CPU
# builds (pytorch.org, "Get started", CPU) to save the CUDA packages; both kinds work.
say "$torch"
install 1 "$torch"
say "$(grep -c '==' "$lock") pinned packages (one to five minutes on a first run)"
install "$(grep -c '==' "$lock")" -r "$lock"
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  say "this torch is a CUDA build: its CUDA packages (several GB)"
  pip install --quiet "$torch" || die "pip could not install what $torch needs; see its message above"
  .venv/bin/python -c 'import torch' || die "torch does not import; remove .venv and try again"
fi
link .venv/bin/python
echo "$stamp" >.venv/.setup-stamp
say "done"
