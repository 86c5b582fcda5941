#!/usr/bin/env bash
# Runs everything that needs a GPU: bash benchmarks/gpu.sh [--list | piece ...], in pieces of less than ten minutes; or
# its most important part in nine minutes: bash benchmarks/gpu.sh --first [--wheels FOLDER] [--rehearse]
#
# --first runs benchmarks/first.py. It writes its JSON files to benchmarks/results/<the GPU's name>/first, or to
# $OUT/first if OUT is set. --wheels unpacks the wheels that benchmarks/gpu_wheels.sh downloaded and imports packages
# from there. --rehearse runs the program on a CPU with tiny sizes, and writes to benchmarks/results/rehearsal if OUT is
# not set.
#
# The pieces are tests of the kernels, every configuration compared with the chunked form, the speed of the kernels, and
# training throughput. A piece writes a JSON file with hardware and versions, and a log, to benchmarks/results/<the GPU's
# name>. A piece whose JSON file exists is skipped, so the same command continues after an interruption. Ends with 1 if a
# piece failed. PYTHON is the interpreter; `python`, or `python3`, if unset.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-$(command -v python || command -v python3)}

if [[ ${1:-} == --first ]]; then
    shift
    rehearse=()
    while (($#)); do
        case $1 in
            --wheels)
                "$python" -m benchmarks.wheels "${2:?give the folder of the wheels}" || exit 2
                site=$(mktemp -d) # a wheel is a zip file of its packages: unpacking it needs no pip and no permission
                for wheel in "$2"/*.whl; do
                    "$python" -m zipfile -e "$wheel" "$site" ||
                        echo "$wheel could not be unpacked: cases that need it fail, and the others run." >&2
                done
                export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
                shift 2
                ;;
            --rehearse) rehearse=(--rehearse) && shift ;;
            *) echo "There is no option '$1'; give --wheels FOLDER or --rehearse." >&2 && exit 2 ;;
        esac
    done
    name=rehearsal
    if ((${#rehearse[@]} == 0)); then
        name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr ' [:upper:]' '_[:lower:]')
        name=${name:-gpu}/first
    fi
    folder=${OUT:+$OUT/first}
    folder=${folder:-benchmarks/results/$name}
    exec "$python" -m benchmarks.first --output "$folder" "${rehearse[@]}"
fi

pieces=()
for file in tests/kernels/test_*.py; do
    pieces+=("$(basename "$file" .py)")
done
for width in 64 128 256; do
    pieces+=("configurations_$width")
done
for case in anchor shared_heads long narrow wide short_rows decode; do
    pieces+=("kernels_$case")
done
for operation in GLA Mamba2 KDA; do
    pieces+=("compiled_$operation")
done
for instance in attention bla retention gla hgrn2 mamba2 rwkv6 deltanet gated_deltanet kda rwkv7 mamba; do
    pieces+=("throughput_$instance")
done

if [[ ${1:-} == --list ]]; then
    printf '%s\n' "${pieces[@]}"
    exit 0
fi
if ! gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null) || [[ -z $gpu ]]; then
    echo "No GPU is visible to nvidia-smi; the same kernels are tested on a CPU by: python -m pytest tests/kernels" >&2
    exit 2
fi
gpu=$(head -n 1 <<<"$gpu" | tr ' [:upper:]' '_[:lower:]')
results=benchmarks/results/$gpu
mkdir -p "$results"

run() { # run PIECE OUTPUT: run one piece and write its figures to OUTPUT
    local name=${1#*_}
    case $1 in
        test_*) "$python" -m benchmarks.kernel_tests "tests/kernels/$1.py" --output "$2" ;;
        configurations_*) "$python" -m benchmarks.tune_kernels --most 0 --widths "$name" --output "$2" ;;
        kernels_*)
            "$python" -m benchmarks.kernels --case "$name" --output "$2" \
                --by torchlmoe PyTorch fla "FlashAttention (SDPA)"
            ;;
        compiled_*) # takes minutes
            "$python" -m benchmarks.kernels --case short_rows --operations "$name" --output "$2" \
                --by torchlmoe PyTorch "compiled PyTorch"
            ;;
        throughput_*) "$python" -m benchmarks.throughput --instances "$name" --output "$2" ;;
    esac
}

failed=()
for piece in "${@:-${pieces[@]}}"; do
    if [[ ! " ${pieces[*]} " == *" $piece "* ]]; then
        echo "There is no piece '$piece'; --list names them." >&2
        exit 2
    fi
    if [[ -e $results/$piece.json ]]; then
        echo "$piece: already done"
        continue
    fi
    echo "$piece: $(date +%H:%M:%S)"
    unfinished=$results/$piece.unfinished
    if timeout 600 bash -c "$(declare -f run); python='$python'; run '$piece' '$unfinished'" >"$results/$piece.log" 2>&1; then
        mv "$unfinished" "$results/$piece.json"
    else
        failed+=("$piece")
        echo "$piece: failed, see $results/$piece.log"
    fi
done
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
