#!/usr/bin/env bash
# All checks that need a GPU, in one command, on a machine that has Python 3.11+, PyTorch, CuPy 14 and cuda-core:
#
#   bash scripts/gpu_check.sh WHEEL        (default: the newest dist/tilewise-*-abi3-*.whl, else .whl/tilewise-*.whl)
#
# Installs that wheel, and nothing else, into a temporary directory; then runs the tests marked `gpu`, the compile gate,
# the compute-sanitizer where there is one, and the benchmark. Logs and gpu.json go to $OUT, or to benches/record.
# Exits with the number of parts that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheel=${1:-$(ls -t dist/tilewise-*-abi3-*.whl .whl/tilewise-*-abi3-*.whl 2>/dev/null | head -n 1)}
[ -f "$wheel" ] || { echo "gpu_check: no wheel; build one with 'make wheel' and name it" >&2; exit 2; }
out=${OUT:-benches/record}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
"$python" -m pip --disable-pip-version-check install -q --no-index --no-deps --target "$work/site" "$wheel" || exit 2
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH} TILEWISE_CACHE_DIR=$work/cache PYTHONUNBUFFERED=1
unset TILEWISE_CUDA_SOURCE_DIR TILEWISE_CUDA_COMPILE TILEWISE_CUDA_WARPGROUPS

failed=0
part() {
  local name=$1
  shift
  echo "== $name"
  "$@" 2>&1 | tee "$out/gpu_$name.log" || { failed=$((failed + 1)); echo "== $name FAILED"; }
}
# The checkout's python/ has no core here, and other versions' warnings are not what is tested.
pytest=("$python" -m pytest -p no:cacheprovider -o pythonpath= -o minversion=7 -o filterwarnings=default)

part versions "$python" -c '
import cupy, torch, tilewise, tilewise.cuda
print("tilewise", tilewise.__version__, tilewise.__file__, "| torch", torch.__version__, "| cupy", cupy.__version__)
reason = tilewise.cuda.why_not()
print(torch.cuda.get_device_name() if reason is None else reason)
raise SystemExit(reason is not None)'
cases=(tests/test_cuda_routers.py tests/test_cuda_moe.py tests/test_cuda_sorting.py tests/test_cuda_experts.py
  tests/test_cuda_expr.py tests/test_cuda_attention.py)
part tests "${pytest[@]}" -m gpu "${cases[@]}" tests/test_cuda_experts_gpu.py tests/test_cuda_attention_gpu.py
TILEWISE_CUDA_WARPGROUPS=1 part warpgroups "${pytest[@]}" -m gpu tests/test_cuda_experts.py tests/test_cuda_experts_gpu.py
part gate "${pytest[@]}" tests/test_cuda_source.py
if command -v compute-sanitizer >/dev/null; then
  # Without caching allocators every array is an allocation of its own, whose ends memcheck sees.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck synccheck initcheck; do
    part "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-regex kns=tilewise \
      "${pytest[@]}" -q -m gpu "${cases[@]}" \
      -k 'torch and not past_two and not captured and not stream and not cupy'
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  echo "== no compute-sanitizer here"
fi
part bench "$python" scripts/gpu_bench.py --out "$out/gpu.json"
part bench_attention "$python" scripts/gpu_bench_attention.py --out "$out/gpu_attention.json"
echo "== $failed part(s) failed"
exit "$failed"
