#!/usr/bin/env bash
# All that needs a GPU, in under twenty minutes and without the network, as one report.
#
#     bash benchmarks/gpu.sh FOLDER                    # FOLDER/report.md
#     bash benchmarks/gpu.sh FOLDER cifar100.zip       # with a short run of benchmarks/cifar100.py
#     DEVICE=cpu bash benchmarks/gpu.sh FOLDER         # each part in its smallest form on a CPU, to see that the script works
#
# A part that fails or takes too long does not stop the others. The report ends with a line for each; the exit status is 1 if any has failed.
set -uo pipefail
[ $# -ge 1 ] && [ $# -le 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
zip=${2:+$(realpath "$2")}
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda} report=$out/report.md summary=() failed=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONWARNINGS=ignore MPLBACKEND=agg PYTHONUNBUFFERED=1

if [ "$device" != cpu ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo 'PyTorch finds no GPU here. `DEVICE=cpu bash benchmarks/gpu.sh FOLDER` tries the script itself on the CPU.' >&2
    exit 2
fi
[ -z "$zip" ] || [ -f "$zip" ] || { echo "$zip: no such file" >&2; exit 2; }

say() { printf '%s\n' "$@" | tee -a "$report"; }
part() {   # name, limit in seconds, command
    local name=$1 limit=$2 start=$SECONDS status=0 result=passed
    shift 2
    say '' "## $name" '' '```' "$*"
    timeout -k 10 "$limit" "$@" 2>&1 | sed -u 's/.*\r//' | tee -a "$report" || status=$?
    [ $status -eq 0 ] || { result="FAILED, status $status"; failed=1; }
    [ $status -ne 124 ] && [ $status -ne 137 ] || result="FAILED, longer than $limit s"
    grep -q MISSED <(sed -n "/^## $name\$/,\$p" "$report") && { result='FAILED, a limit was missed'; failed=1; }
    summary+=("$name: $result, $((SECONDS-start)) s")
    say '```'
}

: > "$report"
say "# fastdistill on ${device/cuda/a GPU}" '' "$(date -u '+%Y-%m-%d %H:%M') UTC, commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)" \
    "$(python -c 'import torch, fastai; print("torch", torch.__version__, "fastai", fastai.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")')"

peers=; python -c 'import fasterai' 2> /dev/null && peers=--peers
step=(python benchmarks/step_cost.py --device "$device")
cifar=(python "$out/benchmarks/cifar100.py" "$out/cifar100" --images "$zip" --seeds 0 --only SoftTarget)
# from a copy: it writes its rows beside itself, and a run as short as here must not stand in the table of the repository
[ -z "$zip" ] || { rm -rf "$out/benchmarks"; cp -r benchmarks "$out/benchmarks"; rm -f "$out"/benchmarks/cifar100*.csv; mkdir -p "$out/cifar100"; }
if [ "$device" = cpu ]; then
    part 'Tests' 200 python -m pytest -q -p no:cacheprovider tests/test_gpu.py tests/test_fake_cuda.py -k 'not test_a_loss and not test_a_fit'
    part 'A step, fp32' 200 "${step[@]}" --teacher resnet18 --size 32 --batch 4 --rounds 2 --only 'SoftTarget, recorded'
    part 'EMATeacher' 200 "${step[@]}" --teacher resnet18 --size 32 --batch 4 --rounds 2 --only EMA
    part 'Small networks' 300 "${step[@]}" --small --rounds 20
    part 'The command' 300 python -m fastdistill --epochs 1 --seeds 1 --out "$out/demo"
    [ -z "$zip" ] || part 'CIFAR-100' 300 "${cifar[@]}" --epochs 1
else
    part 'Tests' 240 python -m pytest -n 4 -q -p no:cacheprovider tests/test_gpu.py tests/test_fake_cuda.py
    for precision in fp32 fp16 bf16; do
        part "A step, $precision" 180 "${step[@]}" --precision $precision --size 224 --batch 128 $peers
    done
    part 'EMATeacher' 60 "${step[@]}" --precision bf16 --size 224 --batch 128 --teacher resnet18 --only EMA
    part 'Small networks' 60 "${step[@]}" --small
    part 'The command' 120 python -m fastdistill --epochs 10 --seeds 2 --out "$out/demo"
    [ -z "$zip" ] || part 'CIFAR-100' 220 "${cifar[@]}" --budget paper --epochs 2 --teacher_epochs 2 --batch 256
fi

say '' '## Summary' '' "${summary[@]/#/- }" '' "$report"
exit $failed
