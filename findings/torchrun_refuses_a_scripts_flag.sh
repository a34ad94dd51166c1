#!/usr/bin/env bash
# torchrun (PyTorch 2.13.0, Python 3.11): a flag of the training script stops the launch, although it comes after the
# script's name, if two or more of torchrun's own flags begin with it. If only one begins with it, it is passed on to the
# script, as are all others, those that torchrun has itself included. With `--` before the script's name all are passed on.
#
# The output seen:
#
#   torch 2.13.0+cpu, Python 3.11
#   script.py --start 1      refused: ambiguous option: --start could match --start-method, --start_method
#   script.py --log 1        refused: ambiguous option: --log could match --log-dir, --log_dir, --logs-specs, --logs_specs
#   script.py --rol 1        passed on
#   script.py --tee 1        passed on
#   script.py --start-from 1 passed on
#   -- script.py --start 1   passed on
#
# Exits with 0 as long as this is what happens, with 1 once it does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy>=1.26"
echo "import sys; print('got', *sys.argv[1:])" > "$folder/script.py"
cd "$folder"

venv/bin/python -c "import sys, torch; print(f'torch {torch.__version__}, Python {sys.version[:4]}')"
wrong=0
try() { # expected, words: launch one process and compare
    local expected=$1 said result
    shift
    if said=$(OMP_NUM_THREADS=1 venv/bin/torchrun --nproc-per-node 1 "$@" 2>&1); then
        grep -q "got ${*: -2}" <<< "$said" && result="passed on" || result="lost"
    else
        result="refused: $(grep -o 'ambiguous option.*' <<< "$said" || echo "$said")"
    fi
    printf '%-24s %s\n' "$*" "$result"
    [[ $result == "$expected"* ]] || wrong=1
}
try refused script.py --start 1
try refused script.py --log 1
try "passed on" script.py --rol 1
try "passed on" script.py --tee 1
try "passed on" script.py --start-from 1
try "passed on" -- script.py --start 1
exit $wrong
