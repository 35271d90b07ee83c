// Attention with AMX tiles: 16 queries by 64 keys (or channels) at a time, 64 products deep.
#include "attention.h"
#include "tiles.h"

namespace stepquant {
namespace {

// Tiles 0 to 3 hold sums, 4 and 5 the operands of a full step of 16 words, 6 and 7 those of the last, shorter one.
struct TileDot : Bytes {
  static constexpr int64_t rows = 16;
  static constexpr int64_t step = 16;

  class Setup {
   public:
    explicit Setup(int64_t words) {
      TileShapes shapes;
      for (int tile = 0; tile < 6; ++tile) shapes.set(tile, 16, 64);
      if (const int64_t rest = words % step; rest) {
        shapes.set(6, 16, 4 * rest);
        shapes.set(7, rest, 64);
      }
      configure_tiles(shapes);
    }
    ~Setup() { release_tiles(); }
    Setup(const Setup&) = delete;
    Setup& operator=(const Setup&) = delete;
  };

  static void scores(
      const int32_t* query, int64_t words, const int32_t* keys, const int32_t* correction, int64_t key_count, int64_t,
      int32_t* scores, int32_t* largest) {
    Ints high[rows];
    for (Ints& h : high) h = Ints{} - (1 << 30);
    for (int64_t key = 0; key < key_count; key += tile_keys) {
      settle_memory();
      score_tile(query, words, keys + key * words, correction + key, scores + key, key_count);
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t* row = scores + r * key_count + key;
        for (int64_t c = 0; c < tile_keys; c += lanes) high[r] = larger(high[r], load_words(row + c));
      }
    }
    for (int64_t r = 0; r < rows; ++r) largest[r] = largest_of(high[r]);
  }

  static void score_tile(
      const int32_t* query, int64_t words, const int32_t* keys, const int32_t* correction, int32_t* scores,
      int64_t key_count) {
    constexpr int64_t line = tile_keys * 4;  // bytes between the words of one key
    STEPQUANT_TILE_LOAD(0, correction, 0);
    STEPQUANT_TILE_LOAD(1, correction + 16, 0);
    STEPQUANT_TILE_LOAD(2, correction + 32, 0);
    STEPQUANT_TILE_LOAD(3, correction + 48, 0);
    int64_t w = 0;
    for (; w + step <= words; w += step) {
      const int32_t* at = keys + w * tile_keys;
      STEPQUANT_TILE_LOAD(4, query + w, words * 4);
      STEPQUANT_TILE_LOAD(5, at, line);
      STEPQUANT_TILE_SIGNED_BY_UNSIGNED(0, 4, 5);
      STEPQUANT_TILE_LOAD(5, at + 16, line);
      STEPQUANT_TILE_SIGNED_BY_UNSIGNED(1, 4, 5);
      STEPQUANT_TILE_LOAD(5, at + 32, line);
      STEPQUANT_TILE_SIGNED_BY_UNSIGNED(2, 4, 5);
      STEPQUANT_TILE_LOAD(5, at + 48, line);
      STEPQUANT_TILE_SIGNED_BY_UNSIGNED(3, 4, 5);
    }
    if (w < words) {
      const int32_t* at = keys + w * tile_keys;
      STEPQUANT_TILE_LOAD(6, query + w, words * 4);
      STEPQUANT_TILE_LOAD(7, at, line);
      STEPQUANT_TILE_SIGNED_BY_UNSIGNED(0, 6, 7);
      STEPQUANT_TILE_LOAD(7, at + 16, line);
      STEPQUANT_TILE_SIGNED_BY_UNSIGNED(1, 6, 7);
      STEPQUANT_TILE_LOAD(7, at + 32, line);
      STEPQUANT_TILE_SIGNED_BY_UNSIGNED(2, 6, 7);
      STEPQUANT_TILE_LOAD(7, at + 48, line);
      STEPQUANT_TILE_SIGNED_BY_UNSIGNED(3, 6, 7);
    }
    STEPQUANT_TILE_STORE(0, scores, key_count * 4);
    STEPQUANT_TILE_STORE(1, scores + 16, key_count * 4);
    STEPQUANT_TILE_STORE(2, scores + 32, key_count * 4);
    STEPQUANT_TILE_STORE(3, scores + 48, key_count * 4);
  }

  static void products(
      const uint8_t* probabilities, int64_t key_count, const int32_t* values, int64_t width, int64_t,
      int32_t* products) {
    settle_memory();
    int64_t c = 0;
    for (; c + 64 <= width; c += 64) four_products(probabilities, key_count, values + c, width, products + c);
    for (; c < width; c += 16) one_product(probabilities, key_count, values + c, width, products + c);
    settle_memory();
  }

  static void four_products(
      const uint8_t* probabilities, int64_t key_count, const int32_t* values, int64_t width, int32_t* products) {
    STEPQUANT_TILE_ZERO(0);
    STEPQUANT_TILE_ZERO(1);
    STEPQUANT_TILE_ZERO(2);
    STEPQUANT_TILE_ZERO(3);
    for (int64_t key = 0; key < key_count; key += tile_keys) {
      const int32_t* at = values + key / per_word * width;
      STEPQUANT_TILE_LOAD(4, probabilities + key, key_count);
      STEPQUANT_TILE_LOAD(5, at, width * 4);
      STEPQUANT_TILE_UNSIGNED_BY_SIGNED(0, 4, 5);
      STEPQUANT_TILE_LOAD(5, at + 16, width * 4);
      STEPQUANT_TILE_UNSIGNED_BY_SIGNED(1, 4, 5);
      STEPQUANT_TILE_LOAD(5, at + 32, width * 4);
      STEPQUANT_TILE_UNSIGNED_BY_SIGNED(2, 4, 5);
      STEPQUANT_TILE_LOAD(5, at + 48, width * 4);
      STEPQUANT_TILE_UNSIGNED_BY_SIGNED(3, 4, 5);
    }
    STEPQUANT_TILE_STORE(0, products, width * 4);
    STEPQUANT_TILE_STORE(1, products + 16, width * 4);
    STEPQUANT_TILE_STORE(2, products + 32, width * 4);
    STEPQUANT_TILE_STORE(3, products + 48, width * 4);
  }

  static void one_product(
      const uint8_t* probabilities, int64_t key_count, const int32_t* values, int64_t width, int32_t* products) {
    STEPQUANT_TILE_ZERO(0);
    for (int64_t key = 0; key < key_count; key += tile_keys) {
      STEPQUANT_TILE_LOAD(4, probabilities + key, key_count);
      STEPQUANT_TILE_LOAD(5, values + key / per_word * width, width * 4);
      STEPQUANT_TILE_UNSIGNED_BY_SIGNED(0, 4, 5);
    }
    STEPQUANT_TILE_STORE(0, products, width * 4);
  }
};

}  // namespace

extern const AttentionKernels amx_attention = {packed_bytes<TileDot>, pack<TileDot>, attend<TileDot>, TileDot::rows};

}  // namespace stepquant
