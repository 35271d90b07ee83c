#!/bin/sh
# Builds the operations with the address and undefined-behaviour sanitizers and runs their tests under them,
# once for every instruction set this machine has; AMX tiles are emulated. Usage: csrc/sanitize.sh [python]
set -eu
cd "$(dirname "$0")/.."
python=${1:-python}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

flags="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
build() {
  rm -f "$place"/stepquant/_C*.so  # a build that fails must not leave the former one to be tested
  STEPQUANT_CXXFLAGS="$flags $1" STEPQUANT_LDFLAGS="-fsanitize=address,undefined" \
    "$python" setup.py -q build_ext --force --build-lib "$place" --build-temp "$place/objects"
  ls "$place"/stepquant/_C*.so  # a failed build is only a warning to setup.py
}
build ""
for part in "$PWD"/src/stepquant/*; do
  case $part in *.so) ;; *) ln -s "$part" "$place/stepquant/" ;; esac
done

# The interpreter is not instrumented: its runtime must come first, and what it never frees is no leak of ours.
check() {
  LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$place" ATEN_CPU_CAPABILITY=$1 "$python" -c "
import sys, pytest
from stepquant.runtime import ops
print('sanitizers over the kernels for', ops.capability(), flush=True)
assert ops.capability() in '$2'.split(), 'expected $2'
sys.exit(pytest.main(['-q', '--noconftest', '-p', 'no:cacheprovider', *sys.argv[1:]]))
" tests/runtime/ops/test_ops.py tests/runtime/ops/test_attention.py \
    tests/runtime/ops/test_attention_by_row.py tests/runtime/ops/test_convolve.py \
    tests/runtime/ops/test_low_rank.py tests/runtime/ops/test_rotary.py \
    tests/runtime/ops/test_rotate.py tests/runtime/ops/test_stored.py
}
has() { grep -qw "$1" /proc/cpuinfo; }  # torch believes ATEN_CPU_CAPABILITY whatever the processor is
if has avx512bw; then check avx512 "avx512 avx512vnni amx"; fi
if has avx2; then check avx2 avx2; fi
check default plain
if has avx512_vnni; then
  build "-DSTEPQUANT_EMULATE_TILES"
  check avx512 amx
else
  echo "left out, for want of AVX-512 VNNI: emulated AMX tiles"
fi
