#!/usr/bin/env bash
# The demo and the tests that older transformers and TRL can change, on those versions, laid over .venv;
# or the tests of every patch that an older Unsloth has the feature for, which has no CPU backend to run a demo.
#   bash scripts/overlay.sh              transformers 4.57.6 and TRL 0.24.0, which many users have
#   bash scripts/overlay.sh 5.5.0        transformers 5.5.0 and TRL 1.0.0
#   bash scripts/overlay.sh 2026.10.8    Unsloth 2026.10.8 (eight minutes and more)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=${1:-4.57.6}
case $version in
  4.57.6) packages=(transformers==4.57.6 trl==0.24.0 huggingface_hub==0.36.0 tokenizers==0.22.1) ;;
  5.5.0) packages=(transformers==5.5.0 trl==1.0.0 tokenizers==0.22.2) ;;
  2026.10.[678]) packages=(unsloth=="$version" unsloth_zoo=="$version") ;;
  *) echo "overlay: no set of packages for $version; there are 4.57.6, 5.5.0, 2026.10.6, 2026.10.7 and 2026.10.8" >&2; exit 2 ;;
esac

bash scripts/setup.sh
overlay=$PWD/.venv/overlays/$version
if [ "$(cat "$overlay/.packages" 2>/dev/null)" != "${packages[*]}" ]; then
  rm -rf "$overlay"
  .venv/bin/python -m pip install --quiet --no-deps --target "$overlay" "${packages[@]}"
  echo "${packages[*]}" >"$overlay/.packages"
fi
export PYTHONPATH=$overlay:$PWD OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
if [[ $version = 2026.* ]]; then UNSLOTH_ALLOW_CPU=1 exec .venv/bin/python scripts/patches.py test --form import; fi

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
code=0
.venv/bin/python -m unsloth_patches demo --steps 3 --prompts 1 --out "$out" || code=1
.venv/bin/python scripts/patches.py test --form import \
  tests/test_chat_template.py tests/test_tool_call_masking.py tests/test_loss_options_in_trainers.py \
  tests/test_loss_options_sft.py tests/test_loss_metrics.py tests/test_compile_report_trainer.py || code=1
exit $code
