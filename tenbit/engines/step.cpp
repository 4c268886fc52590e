// One decode step of a Llama-like model in a single call: embedding, all blocks, final norm and output head, by the
// kernels of kernels.cpp and amx.cpp in the order of `LlamaRunner._blocks`. With few rows the calls themselves would
// otherwise take longer than the arithmetic.
#include <cstdint>
#include <cstring>

extern "C" {

void tb_add_norm(int, void*, const void*, const void*, void*, int64_t, int64_t, float);
void tb_silu_mul(int, const void*, void*, int64_t, int64_t);
void tb_rotate(int, void*, int64_t, int64_t, int64_t, int64_t, const void*, const void*, float, const void*,
               const void*, const int64_t*);
int tb_attend(int, const void*, void*, void*, const int64_t*, void*, int64_t, int64_t, int64_t, int64_t, int64_t);
void tb_linear(int, const uint16_t*, int64_t, int64_t, const uint16_t*, const uint16_t*, int64_t, uint16_t*);

struct TbLinear {  // a packed weight
    const uint16_t *packed, *bias;
    int64_t out, in;
};

struct TbLayer {
    TbLinear qkv, out, gate_up, down;
    const void *norm1, *q_norm, *k_norm, *norm2;
};

struct TbModel {
    int64_t layers, heads, kv_heads, head_dim;
    const TbLayer* layer;
    TbLinear head;
    const uint16_t* embedding;
    const void* norm;
    float eps;
    int dtype;
};

// Feeds tokens [n] at positions [n]; logits [n, V]. keys and values are [layers, rows, kv_heads, capacity, head_dim],
// `scratch` holds n (2 d + qkv + heads * head_dim + 3 f) numbers.
void tb_step(const TbModel* m, const int64_t* tokens, const int64_t* position, int64_t n, const void* cos,
             const void* sin, uint16_t* keys, uint16_t* values, int64_t rows, int64_t capacity, uint16_t* scratch,
             uint16_t* logits) {
    const int dtype = m->dtype;
    const int64_t d = m->head.in, f = m->layer[0].down.in, width = m->layer[0].qkv.out;
    const int64_t plane = rows * m->kv_heads * capacity * m->head_dim;
    uint16_t *x = scratch, *h = x + n * d, *qkv = h + n * d, *attended = qkv + n * width;
    uint16_t *gate_up = attended + n * m->heads * m->head_dim, *product = gate_up + 2 * n * f;
    const auto linear = [&](const uint16_t* in, const TbLinear& w, uint16_t* out) {
        tb_linear(dtype, in, n, w.in, w.packed, w.bias, w.out, out);
    };
    for (int64_t r = 0; r < n; ++r) std::memcpy(x + r * d, m->embedding + tokens[r] * d, d * sizeof(uint16_t));
    tb_add_norm(dtype, x, nullptr, m->layer[0].norm1, h, n, d, m->eps);
    for (int64_t i = 0; i < m->layers; ++i) {
        const TbLayer& layer = m->layer[i];
        linear(h, layer.qkv, qkv);
        tb_rotate(dtype, qkv, n, m->heads, m->kv_heads, m->head_dim, layer.q_norm, layer.k_norm, m->eps, cos, sin,
                  position);
        tb_attend(dtype, qkv, keys + i * plane, values + i * plane, position, attended, n, m->heads, m->kv_heads,
                  m->head_dim, capacity);
        linear(attended, layer.out, h);
        tb_add_norm(dtype, x, h, layer.norm2, h, n, d, m->eps);
        linear(h, layer.gate_up, gate_up);
        tb_silu_mul(dtype, gate_up, product, n, f);
        linear(product, layer.down, h);
        tb_add_norm(dtype, x, h, i + 1 < m->layers ? m->layer[i + 1].norm1 : m->norm, h, n, d, m->eps);
    }
    linear(h, m->head, logits);
}

}  // extern "C"
