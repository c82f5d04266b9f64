#!/usr/bin/env bash
# What has to be seen on a GPU: that its products are exact, and how fast they are. Takes a program that was built
# elsewhere, so that the machine needs no Rust: a driver, and the libraries libnvrtc and (for the comparison) libcublasLt
# of CUDA 12 or 13, from a toolkit or from PyTorch's wheels. Takes some minutes.
#
#   benches/gpu.sh NODE [TABLE.md]
#
# NODE is the `node` program. The table, in Markdown, is for benches/RESULTS.md. Settings, from the environment:
#   DEVICE=cuda:0   which GPU            SECONDS_EXACT=30   time for random products
#   STEP_TOKENS=4096                     tokens of the training step; 0 leaves it out
#   SANITIZER_SECONDS=600                at most for each of compute-sanitizer's tools; it comes last, since it is slow
#   PYTHON=python3                       whose site-packages are searched for libraries
# Ends non-zero if a product is not exact, the sanitizer finds something, or a measurement fails; all steps are tried first.
set -uo pipefail

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
    exit 2
}

[[ $# -ge 1 && $# -le 2 ]] || usage
[[ -x $1 ]] || { echo "error: $1 is no program" >&2; exit 2; }
node=$(realpath "$1")
table=$(realpath -m "${2:-gpu-results.md}")
device=${DEVICE:-cuda:0}
seconds=${SECONDS_EXACT:-30}
step_tokens=${STEP_TOKENS:-4096}
sanitizer_seconds=${SANITIZER_SECONDS:-600}
python=${PYTHON:-python3}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

heading() { printf '\n== %s\n' "$*" >&2; }

# Runs a step; what it prints goes to a file as well as here.
step() {
    local name=$1 out=$2
    shift 2
    heading "$name"
    printf '   %s\n' "$*" >&2
    if "$@" >"$out" 2>"$out.log"; then
        cat "$out" >&2
    else
        local code=$?
        cat "$out" >&2
        tail -n 40 "$out.log" >&2
        echo "FAILED: $name ($code)" >&2
        failed=1
        return 1
    fi
}

# Names a library as the program asks for it. The wheels have versioned names only, and those of CUDA 13 are not among
# the ones that are tried.
heading "libraries of CUDA"
mkdir "$work/lib"
folders=()
while IFS= read -r folder; do
    [[ -d $folder ]] && folders+=("$folder")
done < <(
    "$python" - <<'PYTHON' 2>/dev/null
import glob, site, sys
roots = dict.fromkeys([*site.getsitepackages(), site.getusersitepackages(), *sys.path])
for root in roots:
    for folder in sorted(glob.glob(f"{root}/nvidia/*/lib")):
        print(folder)
PYTHON
    printf '%s\n' "${CUDA_HOME:-/usr/local/cuda}/lib64" "${CUDA_HOME:-/usr/local/cuda}/targets/x86_64-linux/lib"
)
for name in libnvrtc libcublasLt; do
    for folder in "${folders[@]}"; do
        for library in "$folder/$name".so "$folder/$name".so.[0-9]*; do
            if [[ -e $library && ! -e $work/lib/$name.so ]]; then
                ln -s "$library" "$work/lib/$name.so"
                echo "$library" >&2
            fi
        done
    done
    [[ -e $work/lib/$name.so ]] || echo "$name: in none of the folders searched; the system's loader may know it" >&2
done
# The folders themselves too: NVRTC loads a library that lies beside it.
LD_LIBRARY_PATH=$(IFS=:; echo "$work/lib${folders[*]:+:${folders[*]}}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}")
export LD_LIBRARY_PATH
# Nothing of this user's is touched, and kernels are compiled anew.
export XDG_CACHE_HOME=$work/cache XDG_CONFIG_HOME=$work/config

gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv,noheader -i "${device#cuda:}" 2>/dev/null) ||
    gpu="nvidia-smi is not here"
echo "$gpu" >&2

: >"$work/exactness"
if ! step "exactness: each engine against the portable kernel, byte for byte" "$work/exactness" \
    "$node" bench exactness --device "$device" --seconds "$seconds"; then
    # An engine that breaks the GPU for its process hides the others: each by itself, and the rest goes on without it.
    sound=()
    for engine in fused cublaslt hopper; do
        export VELUM_GPU_ENGINES=$engine
        if step "exactness of engine $engine alone" "$work/exactness-$engine" \
            "$node" bench exactness --device "$device" --seconds "$seconds"; then
            sound+=("$engine")
            cat "$work/exactness-$engine" >>"$work/exactness"
        else
            echo "engine $engine: FAILED: $(tail -n 1 "$work/exactness-$engine.log")" >>"$work/exactness"
        fi
    done
    VELUM_GPU_ENGINES=$(IFS=,; echo "${sound[*]}")
    [[ -n $VELUM_GPU_ENGINES ]] || unset VELUM_GPU_ENGINES
fi

step "products of Llama-3.2-1B's layers, forward and backward, beside cuBLASLt" "$work/products" \
    "$node" bench gpu --device "$device" --model-shape llama-3.2-1b --tokens 2048,4096

step "one product with the owner's part" "$work/linear" \
    "$node" bench linear --device "$device" --d-in 2048 --d-out 8192 --tokens 2048

: >"$work/step"
if [[ $step_tokens -gt 0 ]] &&
    step "a model of Llama-3.2-1B's shape, random weights" "$work/synth" \
        "$node" synth --config llama-3.2-1b --out "$work/model"; then
    step "whole training steps of $step_tokens tokens, owner on this machine's cores" "$work/step" \
        "$node" bench step --model "$work/model" --workers 1 --gpus "${device#cuda:}" \
        --tokens "$step_tokens" --sequence 512 --micro-batches 2 --steps 3
fi

sanitizer=$(command -v compute-sanitizer || true)
[[ -n $sanitizer ]] || sanitizer=$(compgen -G "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" | head -n 1)
sanitized="compute-sanitizer is not on this machine"
if [[ -n $sanitizer ]]; then
    sanitized=""
    for tool in memcheck racecheck; do
        # With no time for random products, those with which every engine is tried at its start.
        if step "compute-sanitizer, $tool" "$work/$tool" \
            timeout "$sanitizer_seconds" "$sanitizer" --tool "$tool" --error-exitcode 9 "$node" bench exactness --device "$device" --seconds 0; then
            sanitized+="$tool: nothing found. "
        else
            sanitized+="$tool: FAILED. "
        fi
    done
else
    heading "$sanitized"
fi

# A step's output, as it was printed.
fenced() {
    if [[ -s $1 ]]; then
        # shellcheck disable=SC2016
        printf '```\n%s\n```\n' "$(<"$1")"
    else
        echo "Not measured: the step failed or was left out."
    fi
}

{
    echo "### On a GPU"
    echo
    echo "$(date -u +%F), $gpu; $(nproc) cores, $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)."
    echo
    echo "Exactness:"
    echo
    fenced "$work/exactness"
    echo
    echo "compute-sanitizer: $sanitized"
    echo
    if [[ -s $work/products ]]; then cat "$work/products"; else fenced "$work/products"; fi
    echo
    echo "One product, 2048 × 8192, with the owner's part:"
    echo
    fenced "$work/linear"
    echo
    echo "Training steps of Llama-3.2-1B's shape, random weights:"
    echo
    fenced "$work/step"
} >"$table"

heading "written: $table"
exit "$failed"
