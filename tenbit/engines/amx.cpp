// Matrix products on AMX tiles: y = x w^T + bias in FP16 or BF16, sums in FP32.
//
// The tiles multiply BF16 only. But an FP16 number x (11 significant bits) is exactly the sum of two BF16 numbers (8 bits
// each), hi = bf16(x) and lo = x - hi, so x w = hi hi' + hi lo' + lo hi' + lo lo', four exact products added in FP32:
// an FP16 product with FP32 accumulation, several times faster than the vector units do it.
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

#include "simd.h"

using namespace tenbit;

namespace {

// Weights [out, k] are packed by 32 outputs and 32 inputs: two tiles of 16 outputs, each 16 pairs of inputs by 16
// outputs; for FP16 the two tiles of hi, then the two of lo. Outputs beyond the last are zero.
constexpr int64_t kTile = 512;  // numbers in a tile

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t columns[16] = {};
    uint8_t rows[16] = {};
    TileConfig() {
        for (int i = 0; i < 8; ++i) columns[i] = 64, rows[i] = 16;
    }
};

// The two BF16 numbers whose sum is x.
inline void split(__m512 x, __m256i& hi, __m256i& lo) {
    hi = bf16_bits(x);
    lo = bf16_bits(_mm512_sub_ps(x, bf16_floats(hi)));
}

template <bool SPLIT> void pack(const uint16_t* weight, int64_t out, int64_t k, uint16_t* packed) {
    const int64_t blocks = (out + 31) / 32, width = 2 * kTile * (SPLIT ? 2 : 1);
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t kb = 0; kb < k / 32; ++kb) {
            uint16_t* tile = packed + (b * (k / 32) + kb) * width;
            for (int64_t c = 0; c < 32; ++c) {
                alignas(64) uint16_t hi[32] = {}, lo[32] = {};
                if (b * 32 + c < out) {
                    const uint16_t* row = weight + (b * 32 + c) * k + kb * 32;
                    if (SPLIT) {
                        for (int i = 0; i < 32; i += 16) {
                            __m256i h, l;
                            split(Store<kF16>::load(row + i), h, l);
                            _mm256_store_si256((__m256i*)(hi + i), h);
                            _mm256_store_si256((__m256i*)(lo + i), l);
                        }
                    } else {
                        std::memcpy(hi, row, 64);
                    }
                }
                uint16_t* at = tile + (c / 16) * kTile + (c % 16) * 2;
                for (int i = 0; i < 32; ++i) {
                    at[(i / 2) * 32 + i % 2] = hi[i];
                    if (SPLIT) at[2 * kTile + (i / 2) * 32 + i % 2] = lo[i];
                }
            }
        }
    }
}

// 32 rows (or 16) by 32 outputs, summed over k into acc [32, 32]. `upper` are 16 rows as tiles, the next 16 follow.
template <bool SPLIT, bool TALL> void tiles(const uint16_t* upper, int64_t k, const uint16_t* packed, float* acc) {
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
                for (int64_t j = 0; j < 32; j += 16) {
                    __m256i hi, lo;
                    split(Store<kF16>::load(x + r * k + i + j), hi, lo);
                    _mm256_store_si256((__m256i*)(tile + j), hi);
                    _mm256_store_si256((__m256i*)(tile + kTile + j), lo);
                }
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
    thread_local std::vector<uint16_t> memory;
    memory.resize(padded * k * kWide + 64);
    uint16_t* const rows = (uint16_t*)(((uintptr_t)memory.data() + 63) / 64 * 64);
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
            const uint16_t* weight = packed + b * k * 32 * kWide;
            const __mmask16 left = lanes(out - b * 32), right = lanes(out - b * 32 - 16);
            __m512 add[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            if (bias) add[0] = S::load(bias + b * 32, left), add[1] = S::load(bias + b * 32 + 16, right);
            for (int64_t r = from; r < to; r += 32) {
                if (to - r > 16) tiles<kSplit, true>(rows + r * k * kWide, k, weight, acc);
                else tiles<kSplit, false>(rows + r * k * kWide, k, weight, acc);
                for (int64_t row = r; row < std::min(to, r + 32); ++row) {
                    const float* a = acc + (row - r) * 32;
                    S::store(y + row * out + b * 32, left, _mm512_add_ps(_mm512_load_ps(a), add[0]));
                    if (right) S::store(y + row * out + b * 32 + 16, right, _mm512_add_ps(_mm512_load_ps(a + 16), add[1]));
                }
            }
        }
        _tile_release();
    }
}

}  // namespace

extern "C" {

// Whether the operating system lets this process use the tiles; asks for the permission.
int tb_amx() {
    constexpr int kRequest = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// Numbers of 16 bits that a packed weight takes.
int64_t tb_packed_size(int dtype, int64_t out, int64_t k) {
    return (out + 31) / 32 * (k / 32) * 2 * kTile * (dtype == kF16 ? 2 : 1);
}

void tb_pack(int dtype, const uint16_t* weight, int64_t out, int64_t k, uint16_t* packed) {
    if (dtype == kF16) pack<true>(weight, out, k, packed);
    else pack<false>(weight, out, k, packed);
}

void tb_linear(int dtype, const uint16_t* x, int64_t n, int64_t k, const uint16_t* packed, const uint16_t* bias,
               int64_t out, uint16_t* y) {
    if (dtype == kF16) linear<kF16>(x, n, k, packed, bias, out, y);
    else linear<kBF16>(x, n, k, packed, bias, out, y);
}

}  // extern "C"
