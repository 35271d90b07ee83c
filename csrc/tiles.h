// The eight tile registers: the processor's, or (with STEPQUANT_EMULATE_TILES) plain memory that follows the manual and
// refuses what the processor would refuse, so that the code around them can be tested anywhere.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <immintrin.h>

namespace stepquant {
namespace {

// The operand of ldtilecfg.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t row_count, int64_t bytes) {
    rows[tile] = static_cast<uint8_t>(row_count);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};
static_assert(sizeof(TileShapes) == 64);

#if defined(STEPQUANT_EMULATE_TILES)

struct EmulatedTiles {
  TileShapes shapes;
  bool configured = false;
  alignas(64) uint8_t data[8][16][64];

  static void require(bool condition) {
    if (condition) return;
    std::fputs("a tile instruction that the processor would refuse\n", stderr);
    std::abort();
  }
  void configure(const TileShapes& wanted) {
    for (int t = 0; t < 16; ++t) {
      require(wanted.rows[t] <= 16 && wanted.row_bytes[t] <= 64 && (wanted.rows[t] == 0) == (wanted.row_bytes[t] == 0));
      require(t < 8 || wanted.rows[t] == 0);
    }
    require(wanted.palette == 1 && wanted.start_row == 0);
    shapes = wanted;
    configured = true;
  }
  void load(int t, const void* base, int64_t stride) {
    require(configured && shapes.rows[t] > 0);
    std::memset(data[t], 0, sizeof(data[t]));
    for (int r = 0; r < shapes.rows[t]; ++r) {
      std::memcpy(data[t][r], static_cast<const char*>(base) + r * stride, shapes.row_bytes[t]);
    }
  }
  void store(int t, void* base, int64_t stride) {
    require(configured && shapes.rows[t] > 0);
    for (int r = 0; r < shapes.rows[t]; ++r) {
      std::memcpy(static_cast<char*>(base) + r * stride, data[t][r], shapes.row_bytes[t]);
    }
  }
  void zero(int t) {
    require(configured && shapes.rows[t] > 0);
    std::memset(data[t], 0, sizeof(data[t]));
  }
  // data[sum] += data[a] * data[b], words of four bytes of which one side is signed.
  template <class A, class B>
  void multiply(int sum, int a, int b) {
    require(configured && sum != a && sum != b && a != b);
    require(shapes.rows[sum] == shapes.rows[a] && shapes.row_bytes[sum] == shapes.row_bytes[b]);
    require(shapes.row_bytes[a] == 4 * shapes.rows[b] && shapes.rows[b] > 0);
    for (int m = 0; m < shapes.rows[a]; ++m) {
      for (int k = 0; k < shapes.rows[b]; ++k) {
        for (int n = 0; n < shapes.row_bytes[b] / 4; ++n) {
          int32_t word;
          std::memcpy(&word, &data[sum][m][4 * n], 4);
          for (int i = 0; i < 4; ++i) {
            word += static_cast<A>(data[a][m][4 * k + i]) * static_cast<B>(data[b][k][4 * n + i]);
          }
          std::memcpy(&data[sum][m][4 * n], &word, 4);
        }
      }
    }
  }
};

inline EmulatedTiles& emulated_tiles() {
  thread_local EmulatedTiles tiles;
  return tiles;
}

#define STEPQUANT_TILE_LOAD(tile, base, stride) emulated_tiles().load(tile, base, stride)
#define STEPQUANT_TILE_STORE(tile, base, stride) emulated_tiles().store(tile, base, stride)
#define STEPQUANT_TILE_ZERO(tile) emulated_tiles().zero(tile)
#define STEPQUANT_TILE_SIGNED_BY_UNSIGNED(sum, a, b) emulated_tiles().multiply<int8_t, uint8_t>(sum, a, b)
#define STEPQUANT_TILE_UNSIGNED_BY_SIGNED(sum, a, b) emulated_tiles().multiply<uint8_t, int8_t>(sum, a, b)

inline void configure_tiles(const TileShapes& shapes) {
  emulated_tiles().configure(shapes);
}
inline void release_tiles() {
  emulated_tiles().configured = false;
}

#else

#define STEPQUANT_TILE_LOAD(tile, base, stride) _tile_loadd(tile, base, stride)
#define STEPQUANT_TILE_STORE(tile, base, stride) _tile_stored(tile, base, stride)
#define STEPQUANT_TILE_ZERO(tile) _tile_zero(tile)
#define STEPQUANT_TILE_SIGNED_BY_UNSIGNED(sum, a, b) _tile_dpbsud(sum, a, b)
#define STEPQUANT_TILE_UNSIGNED_BY_SIGNED(sum, a, b) _tile_dpbusd(sum, a, b)

inline void configure_tiles(const TileShapes& shapes) {
  __asm__ volatile("" ::: "memory");  // the instruction reads all 64 bytes, of which the compiler knows eight
  _tile_loadconfig(&shapes);
}
inline void release_tiles() {
  _tile_release();
}

#endif

// What was written before is in memory before a tile is loaded; the compiler does not know what tiles read.
inline void settle_memory() {
  __asm__ volatile("" ::: "memory");
}

}  // namespace
}  // namespace stepquant
