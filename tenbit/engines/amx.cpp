// Matrix products on AMX tiles: y = x w^T + bias in FP16 or BF16, sums in FP32.
//
// The tiles multiply BF16 only. But an FP16 number x (11 significant bits) is exactly the sum of two BF16 numbers (8
// bits each), hi = its first 8 bits and lo = x - hi, so x w = hi hi' + hi lo' + lo hi' + lo lo', four exact products
// added in FP32: an FP16 product with FP32 accumulation, faster than the vector units do it.
#include <omp.h>

#include <vector>

#include "simd.h"

using namespace tenbit;

namespace {

// Weights [out, k] are packed by 32 outputs and 32 inputs: two tiles of 16 outputs, each 16 pairs of inputs by 16
// outputs. Outputs beyond the last are zero. Blocks of FP16 are split when they are used, so that no more than the
// weights themselves is read from memory.
constexpr int64_t kTile = 512;  // numbers in a tile

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t columns[16] = {};
    uint8_t rows[16] = {};
    TileConfig() {
        for (int i = 0; i < 8; ++i) columns[i] = 64, rows[i] = 16;
    }
};

// 32 FP16 numbers as two BF16 numbers each: hi has their first 8 significant bits, lo the other 3.
inline void split(const uint16_t* x, uint16_t* hi, uint16_t* lo) {
    const __m512 a = Store<kF16>::load(x), b = Store<kF16>::load(x + 16);
    const __m512 upper = _mm512_castsi512_ps(_mm512_set1_epi32((int)0xffff0000));
    const __m512 high_a = _mm512_and_ps(a, upper), high_b = _mm512_and_ps(b, upper);
    // BF16 is the upper half of FP32: the odd 16-bit words.
    alignas(64) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i odd = _mm512_load_si512(kOdd);
    const auto words = [&](__m512 low, __m512 high) {
        return _mm512_permutex2var_epi16(_mm512_castps_si512(low), odd, _mm512_castps_si512(high));
    };
    _mm512_store_si512(hi, words(high_a, high_b));
    _mm512_store_si512(lo, words(_mm512_sub_ps(a, high_a), _mm512_sub_ps(b, high_b)));
}

inline void pack(const uint16_t* weight, int64_t out, int64_t k, uint16_t* packed) {
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < (out + 31) / 32; ++b)
        for (int64_t i = 0; i < k; i += 32)
            for (int64_t c = 0; c < 32; ++c) {
                uint16_t* tile = packed + b * 32 * k + i * 32 + c / 16 * kTile + c % 16 * 2;
                const uint16_t* row = weight + (b * 32 + c) * k + i;
                for (int64_t j = 0; j < 32; ++j) tile[j / 2 * 32 + j % 2] = b * 32 + c < out ? row[j] : 0;
            }
}

// One block of packed FP16 weights, k by 32, as tiles of hi and lo.
inline void split_block(const uint16_t* packed, int64_t k, uint16_t* out) {
    for (int64_t i = 0; i < k; i += 32, packed += 2 * kTile, out += 4 * kTile)
        for (int64_t j = 0; j < 2 * kTile; j += 32) split(packed + j, out + j, out + 2 * kTile + j);
}

// Memory of this thread for as many numbers, aligned to a line.
template <int WHAT> uint16_t* scratch(int64_t numbers) {
    thread_local std::vector<uint16_t> memory;
    if ((int64_t)memory.size() < numbers + 32) memory.resize(numbers + 32);
    return (uint16_t*)(((uintptr_t)memory.data() + 63) / 64 * 64);
}

// 32 rows (or 16) by 32 outputs, summed over k into acc [32, 32]. `upper` are 16 rows as tiles, the next 16 follow.
// Meanwhile fetches `ahead` lines per step from `next`: weights come from far away, and the products do not wait.
template <bool SPLIT, bool TALL>
void tiles(const uint16_t* upper, int64_t k, const uint16_t* packed, float* acc, const uint16_t* next, int64_t ahead) {
    constexpr int64_t kWide = SPLIT ? 2 : 1;
    const uint16_t* lower = upper + 16 * k * kWide;
    _tile_zero(0);
    _tile_zero(1);
    if (TALL) {
        _tile_zero(2);
        _tile_zero(3);
    }
    const auto multiply = [] {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (TALL) {
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    };
    for (int64_t i = 0; i < k; i += 32, packed += 2 * kTile * kWide, upper += kTile * kWide, lower += kTile * kWide) {
        for (int64_t line = 0; line < ahead; ++line, next += 32) _mm_prefetch(next, _MM_HINT_T1);
        const auto rows = [&](int64_t offset) {
            _tile_loadd(4, upper + offset, 64);
            if (TALL) _tile_loadd(5, lower + offset, 64);
        };
        const auto weights = [&](int64_t offset) {
            _tile_loadd(6, packed + offset, 64);
            _tile_loadd(7, packed + offset + kTile, 64);
        };
        weights(0);
        rows(0);
        multiply();
        if (SPLIT) {
            // hi hi' is done; then lo hi', lo lo', hi lo': every step loads one side only.
            rows(kTile);
            multiply();
            weights(2 * kTile);
            multiply();
            rows(0);
            multiply();
        }
    }
    _tile_stored(0, acc, 128);
    _tile_stored(1, acc + 16, 128);
    if (TALL) {
        _tile_stored(2, acc + 512, 128);
        _tile_stored(3, acc + 528, 128);
    }
}

// Rows [n, k] as tiles of 16 rows by 32 inputs, for FP16 hi then lo; rows from n to `padded`, a multiple of 16, are
// zero. To be called inside `omp parallel`.
template <bool SPLIT> void pack_rows(const uint16_t* x, int64_t n, int64_t padded, int64_t k, uint16_t* out) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < padded; ++r)
        for (int64_t i = 0; i < k; i += 32) {
            uint16_t* tile = out + (r / 16 * 16 * k + i * 16) * (SPLIT ? 2 : 1) + r % 16 * 32;
            if (r >= n) {
                std::memset(tile, 0, 64);
                if (SPLIT) std::memset(tile + kTile, 0, 64);
            } else if (SPLIT) {
                split(x + r * k + i, tile, tile + kTile);
            } else {
                std::memcpy(tile, x + r * k + i, 64);
            }
        }
}

template <int T> void linear(const uint16_t* x, int64_t n, int64_t k, const uint16_t* packed, const uint16_t* bias,
                             int64_t out, uint16_t* y) {
    using S = Store<T>;
    constexpr bool kSplit = T == kF16;
    constexpr int64_t kWide = kSplit ? 2 : 1;
    const int64_t padded = (n + 15) / 16 * 16, blocks = (out + 31) / 32;
    uint16_t* const rows = scratch<0>(padded * k * kWide);
    int64_t chunk = 128;
    while (chunk > 32 && blocks * ((n + chunk - 1) / chunk) < 2 * omp_get_max_threads()) chunk /= 2;
    const int64_t chunks = (n + chunk - 1) / chunk;
#pragma omp parallel
    {
        pack_rows<kSplit>(x, n, padded, k, rows);
        const TileConfig config;
        _tile_loadconfig(&config);
        alignas(64) float acc[32 * 32];
#pragma omp for schedule(static)
        for (int64_t task = 0; task < blocks * chunks; ++task) {
            const int64_t b = task / chunks, from = (task % chunks) * chunk, to = std::min(n, from + chunk);
            const uint16_t *weight = packed + b * k * 32, *next = weight + k * 32;
            if (kSplit) {
                uint16_t* const halves = scratch<1>(k * 32 * kWide);
                split_block(weight, k, halves);
                weight = halves;
            }
            const __mmask16 left = lanes(out - b * 32), right = lanes(out - b * 32 - 16);
            __m512 add[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            if (bias) add[0] = S::load(bias + b * 32, left), add[1] = S::load(bias + b * 32 + 16, right);
            // The next block's weights, a part with each 32 rows.
            const int64_t parts = (to - from + 31) / 32, ahead = (32 + parts - 1) / parts;
            for (int64_t r = from; r < to; r += 32, next += ahead * k) {
                if (to - r > 16) tiles<kSplit, true>(rows + r * k * kWide, k, weight, acc, next, ahead);
                else tiles<kSplit, false>(rows + r * k * kWide, k, weight, acc, next, ahead);
                for (int64_t row = r; row < std::min(to, r + 32); ++row) {
                    const float* a = acc + (row - r) * 32;
                    S::store(y + row * out + b * 32, left, _mm512_add_ps(_mm512_load_ps(a), add[0]));
                    if (!right) continue;
                    S::store(y + row * out + b * 32 + 16, right, _mm512_add_ps(_mm512_load_ps(a + 16), add[1]));
                }
            }
        }
        _tile_release();
    }
}

}  // namespace

extern "C" {

// FP16 and BF16 alike; `packed` has room for ceil(out / 32) * 32 * k numbers.
void tb_pack(const uint16_t* weight, int64_t out, int64_t k, uint16_t* packed) { pack(weight, out, k, packed); }

void tb_linear(int dtype, const uint16_t* x, int64_t n, int64_t k, const uint16_t* packed, const uint16_t* bias,
               int64_t out, uint16_t* y) {
    if (dtype == kF16) linear<kF16>(x, n, k, packed, bias, out, y);
    else linear<kBF16>(x, n, k, packed, bias, out, y);
}

}  // extern "C"
