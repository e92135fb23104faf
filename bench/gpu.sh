#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that may have no network:
#   bench/gpu.sh [build] [test] [sanitize] [bench]      (all four without arguments)
# Needs python3 with a CUDA torch, nvcc, scikit-build-core, pybind11, ninja, pytest and pytest-benchmark.
# A step that fails does not stop the next; the exit code is 0 only if none failed. Results go to
# bench/results/ and, where OUT names a folder, there too.
#
# PYTHON: the interpreter. EFFOPS_CUDA_ARCHITECTURES: default, that of the first GPU.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
work=$root/.build/gpu
site=$work/site
out=${OUT:-}
results=$root/bench/results
mkdir -p "$work" "$results"
[ $# -gt 0 ] || set -- build test sanitize bench

summary=()
failed=0

# step NAME COMMAND...: runs it with its output in a log, notes how it went.
step() {
  local name=$1 start=$SECONDS log="$work/${1// /-}.log"
  shift
  echo "== $name"
  if "$@" >"$log" 2>&1; then
    summary+=("$(printf '%-22s ok      %4d s' "$name" $((SECONDS - start)))")
  else
    summary+=("$(printf '%-22s FAILED  %4d s' "$name" $((SECONDS - start)))")
    failed=1
  fi
  tail -n "${TAIL:-15}" "$log"
  cat "$log" >>"$work/all.log"
}

skip() { summary+=("$(printf '%-22s skipped: %s' "$1" "$2")"); }

# Commands run outside the root, so that the sources there do not hide the built package.
outside() { (cd "$work" && PYTHONPATH="$site" "$@"); }

build() {
  local arch=${EFFOPS_CUDA_ARCHITECTURES:-}
  [ -n "$arch" ] || arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
  rm -rf "$site"
  EFFOPS_CUDA=on EFFOPS_CUDA_ARCHITECTURES=$arch "$python" -m pip install --no-build-isolation --no-deps \
    --no-index --target "$site" "$root"
}

test_suite() {
  outside "$python" -m pytest -q -c "$root/pyproject.toml" --rootdir="$root" -p no:cacheprovider -W default \
    -k cuda "$root/python_tests"
}

smoke() { outside "$python" "$root/bench/gpu_smoke.py"; }

# Some virtual machines refuse the sanitizer its device: asked with a program of one kernel.
sanitizer_works() {
  command -v compute-sanitizer >/dev/null &&
    (cd "$work" && timeout 120 compute-sanitizer --error-exitcode 9 "$python" -c \
      'import torch; torch.ones(8, device="cuda").add_(1); torch.cuda.synchronize()') >"$work/probe.log" 2>&1
}

sanitized() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 outside timeout 300 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$python" "$root/bench/gpu_smoke.py"
}

benchmarks() {
  outside "$python" "$root/bench/report.py" run --device cuda --seconds "${SECONDS_PER_RACE:-2}"
}

: >"$work/all.log"
touch "$work/started"
for part in "$@"; do
  case $part in
    build)
      step build build
      TAIL=40 step collect-env outside "$python" -m effops.collect_env
      ;;
    test)
      step smoke smoke
      step "cuda tests" test_suite
      ;;
    sanitize)
      if sanitizer_works; then
        for tool in memcheck racecheck initcheck synccheck; do step "$tool" sanitized "$tool"; done
      else
        skip sanitize "compute-sanitizer is missing or refuses this device"
      fi
      ;;
    bench) TAIL=40 step benchmarks benchmarks ;;
    *)
      echo "unknown step $part: expected build, test, sanitize or bench" >&2
      exit 2
      ;;
  esac
done

printf '%s\n' "${summary[@]}" | tee "$work/summary.txt"
if [ -n "$out" ]; then
  cp "$work/summary.txt" "$work/all.log" "$out"
  find "$results" -name '*.json' -newer "$work/started" -exec cp {} "$out" \;
fi
exit $failed
