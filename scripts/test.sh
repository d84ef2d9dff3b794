#!/usr/bin/env bash
# All tests: this project's own, then the patches' tests in the import form, in the fork, on stock
# Unsloth, where each file has to fail, and as Unsloth's own CI would run them. Ends with pytest's summary lines.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ $# -ne 0 ]; then
  echo "test: takes no arguments, got $*; single files: .venv/bin/python scripts/patches.py test --form import FILE" >&2
  exit 2
fi
bash scripts/setup.sh || { echo "test: setup failed, see its message above" >&2; exit 1; }
python=.venv/bin/python
# Two threads of torch on a shared machine cost more than they bring at the sizes of these tests.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
unset PYTHONDONTWRITEBYTECODE # a fork's modules are compiled once for all processes

# Three at a time on two cores, the longest first: each is one process after another and waits now and then,
# for git, for ranks, and the three come to an end together.
patches="$python scripts/patches.py"
names=("form: import" "form: fork" "own tests" "form: upstream" "form: stock" "rebase on the other supported releases")
commands=(
  "$patches test --form import"
  "$patches test --form fork"
  "$python -m pytest tests/project -q --color=no --durations=15 --durations-min=5"
  "$patches test --form upstream"
  "$patches test --form stock"
  "$patches rebase"
)

logs=$(mktemp -d)
pid_of_lanes=
clean_up() {
  if [ -n "$pid_of_lanes" ]; then kill -- "-$pid_of_lanes" 2>/dev/null; fi
  rm -rf "$logs"
}
trap clean_up EXIT
trap 'exit 130' INT TERM # else what comes next would start after Ctrl-C
summaries=()
failed=()
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

# work FOLDER COMMAND: what `show` reads; the exit code comes last.
work() {
  SECONDS=0
  echo $$ >"$1/pid"
  bash -c "$2" >"$1/log" 2>&1
  echo "$? $SECONDS" >"$1/ended"
}
export -f work

# show NUMBER: the output from its beginning until the command ends; keep the summary lines and a failure.
show() {
  local name=${names[$1]} folder=$logs/$1 code seconds
  say "$name"
  until [ -s "$folder/pid" ] && [ -e "$folder/log" ]; do
    kill -0 "$pid_of_lanes" || exit 1
    sleep 0.2
  done
  tail --pid="$(cat "$folder/pid")" -f -n +1 "$folder/log"
  read -r code seconds <"$folder/ended" || code="none: it was killed"
  while IFS= read -r line; do summaries+=("$line"); done < <(
    sed -E 's/\x1b\[[0-9;]*m//g; s/^=+ //; s/ =+$//' "$folder/log" |
      grep -E '^((import|fork|stock|upstream) / [a-z]+: )?[0-9]+ (passed|failed|skipped|errors?|deselected|xfailed).* in [0-9.]+s' |
      { if [ "$name" = "own tests" ]; then sed 's/^/own tests: /'; else grep -E '^(import|fork|stock|upstream) / '; fi; }
  )
  if [ "$code" != 0 ]; then failed+=("$name (exit code $code)"); fi
  echo "$name: ${seconds:-?} s"
}

for i in "${!names[@]}"; do mkdir "$logs/$i"; done
# A process group of their own, so that they can be ended as one.
setsid xargs -0 -P 3 -n 2 bash -c 'work "$@"' _ < <(
  for i in "${!commands[@]}"; do printf '%s\0' "$logs/$i" "${commands[$i]}"; done
) &
pid_of_lanes=$!
for i in "${!names[@]}"; do show "$i"; done
wait "$pid_of_lanes"
pid_of_lanes=

say "summary after $SECONDS s"
mkdir -p .pytest_cache
printf '%s\n' ${summaries[@]+"${summaries[@]}"} | tee .pytest_cache/test-summaries
if [ "${#failed[@]}" -ne 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "all as expected: green in the import form, in the fork and in Unsloth's CI conditions, and every test file fails on stock Unsloth"
