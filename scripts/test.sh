#!/usr/bin/env bash
# All tests: this project's own, then the patches' tests in the import form, in the fork, on stock
# Unsloth, where each file has to fail, and as Unsloth's own CI would run them. Ends with pytest's summary lines.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh || { echo "test: setup failed, see its message above" >&2; exit 1; }
python=.venv/bin/python
# Two threads of torch on a shared machine cost more than they bring at the sizes of these tests.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false

logs=$(mktemp -d)
pid_beside=
clean_up() {
  if [ -n "$pid_beside" ]; then kill -- "-$pid_beside" 2>/dev/null; fi
  rm -rf "$logs"
}
trap clean_up EXIT
trap 'exit 130' INT TERM # else what comes next would start after Ctrl-C
summaries=()
failed=()
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

# run NAME COMMAND...: show the output, keep the summary lines, remember a failure.
run() {
  local name=$1 code started=$SECONDS
  shift
  say "$name"
  "$@" 2>&1 | tee "$logs/shown"
  code=${PIPESTATUS[0]}
  while IFS= read -r line; do summaries+=("$line"); done < <(
    sed -E 's/\x1b\[[0-9;]*m//g; s/^=+ //; s/ =+$//' "$logs/shown" |
      grep -E '^((import|fork|stock|upstream) / [a-z]+: )?[0-9]+ (passed|failed|skipped|errors?|deselected|xfailed).* in [0-9.]+s' |
      { if [ "$name" = "own tests" ]; then sed 's/^/own tests: /'; else grep -E '^(import|fork|stock|upstream) / '; fi; }
  )
  if [ "$code" -ne 0 ]; then failed+=("$name (exit code $code)"); fi
  echo "$name: $((SECONDS - started)) s"
}

# beside NAME COMMAND...: start it and go on; the next `catch_up` shows its output from the beginning.
beside() {
  name_beside=$1
  shift
  say "$name_beside: started, shown below"
  setsid "$@" > "$logs/beside" 2>&1 & # a process group of its own, so that it can be ended as one
  pid_beside=$!
}
catch_up() {
  run "$name_beside" tail --pid="$pid_beside" -f -n +1 "$logs/beside"
  wait "$pid_beside" || failed+=("$name_beside (exit code $?)")
  pid_beside=
}

# Two at a time: each is one process after another, on one core.
patches="$python scripts/patches.py"
beside "forms: stock and upstream; rebase on the other supported releases" bash -c "
  code=0
  $patches test --form stock || code=1
  $patches test --form upstream || code=1
  $patches rebase || code=1
  exit \$code"
run "own tests" "$python" -m pytest tests/project -q --color=no --durations=15 --durations-min=5
catch_up
beside "form: fork" "$python" scripts/patches.py test --form fork
run "form: import" "$python" scripts/patches.py test --form import
catch_up

say "summary after $SECONDS s"
mkdir -p .pytest_cache
printf '%s\n' ${summaries[@]+"${summaries[@]}"} | tee .pytest_cache/test-summaries
if [ "${#failed[@]}" -ne 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all as expected: green in the import form, in the fork and in Unsloth's CI conditions, and every test file fails on stock Unsloth"
