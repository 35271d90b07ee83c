// Which kernels this machine runs. ATEN_CPU_CAPABILITY (default, avx2, avx512) lowers the choice, as it does in torch.
#include <ATen/Version.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace stepquant {
namespace {

#if defined(__x86_64__)

// Linux hands out the tiles' eight kilobytes of state only to processes that ask.
bool tiles_granted() {
#if defined(STEPQUANT_EMULATE_TILES)
  return true;
#elif defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
      syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

Kernels choose() {
  const std::string capability = at::get_cpu_capability();
  if (capability != "AVX512") return capability == "AVX2" ? avx2_kernels : plain_kernels;
  Kernels chosen = avx512_kernels;
  if (__builtin_cpu_supports("avx512vnni")) {
    const bool tiles = tiles_granted();
    chosen.name = tiles ? "amx" : "avx512vnni";
    chosen.convolve = __builtin_cpu_supports("avx512bf16") ? avx512bf16_convolve : avx512vnni_convolve;
    chosen.attention = tiles ? amx_attention : avx512vnni_attention;
  }
  return chosen;
}

#else

Kernels choose() {
  return plain_kernels;
}

#endif

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace stepquant
