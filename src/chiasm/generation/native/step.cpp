// One step of a Llama-shaped decoder over a static KV cache: every layer and the head in one parallel region.
//
// Weights are float32, int8 with a scale for each 32, or int4 with a scale and a minimum for each 32. Activations meet
// int8 and int4 weights as int16 with a scale for each 32 of their own, so that all of the cost is in the weights.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#include <omp.h>
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define WIDE 1
#endif

namespace {

constexpr int64_t GROUP = 32;
constexpr int64_t TOGETHER = 8;
constexpr float LARGEST = 32767.f;
enum Kind : int64_t { FLOAT32 = 0, INT8 = 1, INT4 = 2 };

struct Matrix {
    const void* data;
    const uint16_t* scales;
    const uint16_t* minima;
    const float* bias;
    int64_t kind, rows, columns;
};

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    const float *attention_norm, *feed_forward_norm, *q_norm, *k_norm, *after_attention, *after_feed_forward;
    float *keys, *values;
    const float* rotation;
    int64_t window;
};

struct Model {
    const Layer* layers;
    const float* norm;
    Matrix head;
    int64_t width, heads, kv_heads, head_dim, inner, slot_stride, head_stride, gelu;
    float eps, scale;
};

// Rows of activations as a thread sees them: float32, and int16 by groups where a matrix wants that.
struct Rows {
    int64_t count = 0, columns = 0, groups = 0;
    std::vector<float> values, scales, sums;
    std::vector<int16_t> quantised;

    void resize(int64_t rows, int64_t width) {
        count = rows, columns = width, groups = (width + GROUP - 1) / GROUP;
        values.resize(rows * width);
    }
    float* row(int64_t index) { return values.data() + index * columns; }
    void quantise() {
        const int64_t padded = groups * GROUP;
        quantised.assign(count * padded, 0), scales.resize(count * groups + TOGETHER), sums.resize(count * groups + TOGETHER);
        for (int64_t r = 0; r < count; r++)
            for (int64_t g = 0; g < groups; g++) {
                const float* x = row(r) + g * GROUP;
                const int64_t size = std::min(GROUP, columns - g * GROUP);
                float most = 0, sum = 0;
                for (int64_t i = 0; i < size; i++) most = std::max(most, std::fabs(x[i])), sum += x[i];
                const float inverse = most > 0 ? LARGEST / most : 0.f;
                int16_t* q = quantised.data() + r * padded + g * GROUP;
                for (int64_t i = 0; i < size; i++) q[i] = (int16_t)std::nearbyintf(x[i] * inverse);
                scales[r * groups + g] = most / LARGEST, sums[r * groups + g] = sum;
            }
    }
};

#ifdef WIDE
// Up to eight numbers in half precision; the rest are 0.
inline __m256 from_halves(const uint16_t* bits, int64_t count) {
    if (count == TOGETHER) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)bits));
    alignas(16) uint16_t some[TOGETHER] = {};
    std::memcpy(some, bits, count * sizeof(uint16_t));
    return _mm256_cvtph_ps(_mm_load_si128((const __m128i*)some));
}
#else
inline float from_half(uint16_t bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (!exponent) return (sign ? -1.f : 1.f) * std::ldexp((float)fraction, -24);
    const uint32_t word = sign | ((exponent + 112) << 23) | (fraction << 13);
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}
#endif

#ifdef WIDE
inline float total(__m256 x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#endif

inline float dot(const float* a, const float* b, int64_t size) {
    float sum = 0;
    int64_t i = 0;
#ifdef WIDE
    __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    for (; i + 32 <= size; i += 32) {
        s0 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), s0);
        s1 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8), _mm256_loadu_ps(b + i + 8), s1);
        s2 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 16), _mm256_loadu_ps(b + i + 16), s2);
        s3 = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 24), _mm256_loadu_ps(b + i + 24), s3);
    }
    sum = total(_mm256_add_ps(_mm256_add_ps(s0, s1), _mm256_add_ps(s2, s3)));
#endif
    for (; i < size; i++) sum += a[i] * b[i];
    return sum;
}

// One row of a float32 matrix times N rows of activations.
template <int N>
inline void times_float(const float* w, const float* x, int64_t columns, float* out) {
    int64_t i = 0;
    for (int n = 0; n < N; n++) out[n] = 0;
#ifdef WIDE
    __m256 sums[N];
    for (int n = 0; n < N; n++) sums[n] = _mm256_setzero_ps();
    for (; i + 8 <= columns; i += 8) {
        const __m256 weight = _mm256_loadu_ps(w + i);
        for (int n = 0; n < N; n++) sums[n] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + n * columns + i), sums[n]);
    }
    for (int n = 0; n < N; n++) out[n] = total(sums[n]);
#endif
    for (; i < columns; i++)
        for (int n = 0; n < N; n++) out[n] += w[i] * x[n * columns + i];
}

// The 32 weights of a group: signed for int8, 0 to 15 for int4, where byte i holds the weights i and i + 16.
template <int KIND>
struct Group {
#ifdef WIDE
    __m256i low, high;
    explicit Group(const uint8_t* data) {
        const __m128i packed = _mm_loadu_si128((const __m128i*)data);
        if (KIND == INT8) {
            low = _mm256_cvtepi8_epi16(packed), high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)data + 1));
        } else {
            const __m128i mask = _mm_set1_epi8(15);
            low = _mm256_cvtepu8_epi16(_mm_and_si128(packed, mask));
            high = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(packed, 4), mask));
        }
    }
    // Eight partial sums of products with activations.
    __m256 times(const int16_t* q) const {
        const __m256i a = _mm256_madd_epi16(low, _mm256_loadu_si256((const __m256i*)q));
        const __m256i b = _mm256_madd_epi16(high, _mm256_loadu_si256((const __m256i*)q + 1));
        return _mm256_cvtepi32_ps(_mm256_add_epi32(a, b));
    }
#else
    const uint8_t* bytes;
    explicit Group(const uint8_t* data) : bytes(data) {}
    float times(const int16_t* q) const {
        int32_t sum = 0;
        for (int i = 0; i < GROUP; i++)
            sum += q[i] * (KIND == INT8 ? (int32_t)(int8_t)bytes[i] : (i < 16 ? bytes[i] & 15 : bytes[i - 16] >> 4));
        return (float)sum;
    }
#endif
};

// One row of a quantised matrix times N rows of activations. Scales are made for eight groups at a time.
template <int KIND, int N>
inline void times_groups(const Matrix& w, int64_t index, const Rows& x, int64_t first, float* out) {
    const int64_t groups = x.groups, bytes = KIND == INT8 ? GROUP : GROUP / 2;
    const uint8_t* data = (const uint8_t*)w.data + index * groups * bytes;
    const uint16_t *scales = w.scales + index * groups, *minima = KIND == INT4 ? w.minima + index * groups : nullptr;
    const int16_t* q = x.quantised.data() + first * groups * GROUP;
    const float *sx = x.scales.data() + first * groups, *sum = x.sums.data() + first * groups;
#ifdef WIDE
    __m256 sums[N];
    alignas(32) float both[N][TOGETHER];
    for (int n = 0; n < N; n++) sums[n] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g += TOGETHER) {
        const int64_t count = std::min(TOGETHER, groups - g);
        const __m256 scale = from_halves(scales + g, count);
        for (int n = 0; n < N; n++)
            _mm256_store_ps(both[n], _mm256_mul_ps(scale, _mm256_loadu_ps(sx + n * groups + g)));
        if (KIND == INT4) {
            const __m256 minimum = from_halves(minima + g, count);
            for (int n = 0; n < N; n++)
                sums[n] = _mm256_fmadd_ps(minimum, _mm256_loadu_ps(sum + n * groups + g), sums[n]);
        }
        for (int64_t i = 0; i < count; i++) {
            const Group<KIND> group(data + (g + i) * bytes);
            const int16_t* here = q + (g + i) * GROUP;
            for (int n = 0; n < N; n++)
                sums[n] = _mm256_fmadd_ps(group.times(here + n * groups * GROUP), _mm256_broadcast_ss(&both[n][i]), sums[n]);
        }
    }
    for (int n = 0; n < N; n++) out[n] = total(sums[n]);
#else
    for (int n = 0; n < N; n++) {
        out[n] = 0;
        for (int64_t g = 0; g < groups; g++) {
            const int64_t place = n * groups + g;
            out[n] += Group<KIND>(data + g * bytes).times(q + place * GROUP) * from_half(scales[g]) * sx[place];
            if (KIND == INT4) out[n] += from_half(minima[g]) * sum[place];
        }
    }
#endif
}

template <int N>
inline void times(const Matrix& w, int64_t index, const Rows& x, int64_t first, float* out) {
    if (w.kind == FLOAT32)
        times_float<N>((const float*)w.data + index * w.columns, x.values.data() + first * w.columns, w.columns, out);
    else if (w.kind == INT8)
        times_groups<INT8, N>(w, index, x, first, out);
    else
        times_groups<INT4, N>(w, index, x, first, out);
    if (w.bias)
        for (int n = 0; n < N; n++) out[n] += w.bias[index];
}

// out[n] = row `index` of w times row n of x, for all rows; a row of weights is read from memory once.
inline void row_times(const Matrix& w, int64_t index, const Rows& x, float* out) {
    int64_t n = 0;
    for (; n + 8 <= x.count; n += 8) times<8>(w, index, x, n, out + n);
    for (; n + 4 <= x.count; n += 4) times<4>(w, index, x, n, out + n);
    for (; n + 2 <= x.count; n += 2) times<2>(w, index, x, n, out + n);
    for (; n < x.count; n++) times<1>(w, index, x, n, out + n);
}

struct Share {
    int64_t first, last;
    Share(int64_t items, int64_t thread, int64_t threads)
        : first(items * thread / threads), last(items * (thread + 1) / threads) {}
};

inline void rms_norm(const float* x, const float* weight, int64_t size, float eps, float* out) {
    const float factor = 1.f / std::sqrt(dot(x, x, size) / (float)size + eps);
    for (int64_t i = 0; i < size; i++) out[i] = x[i] * factor * weight[i];
}

inline void rotate(float* x, const float* cosines, int64_t size) {
    const int64_t half = size / 2;
    const float* sines = cosines + half;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosines[i] - b * sines[i], x[i + half] = b * cosines[i] + a * sines[i];
    }
}

inline float activated(float x, bool gelu) {
    if (gelu) return 0.5f * x * (1.f + std::tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
    return x / (1.f + std::exp(-x));
}

// All that threads share during a call.
struct Shared {
    std::vector<float> q, attended, inner, change;
};

struct Step {
    const Model& m;
    float* hidden;
    const int64_t count;
    const int64_t *slots, *positions;
    Shared& shared;
    const int64_t thread, threads;
    Rows x;
    std::vector<float> scores, out;

    void load(const float* from, int64_t width, const float* norm, const Matrix& reader) {
        x.resize(count, width);
        for (int64_t r = 0; r < count; r++) {
            if (norm) rms_norm(from + r * width, norm, width, m.eps, x.row(r));
            else std::memcpy(x.row(r), from + r * width, width * sizeof(float));
        }
        if (reader.kind != FLOAT32) x.quantise();
    }

    template <class Put>
    void multiply(const Matrix& w, Put put) {
        const Share share(w.rows, thread, threads);
        out.resize(count);
        for (int64_t i = share.first; i < share.last; i++) {
            row_times(w, i, x, out.data());
            for (int64_t r = 0; r < count; r++) put(r, i, out[r]);
        }
    }

    float* place(float* store, int64_t row, int64_t head, int64_t position) {
        return store + slots[row] * m.slot_stride + head * m.head_stride + position * m.head_dim;
    }

    void project(const Layer& layer) {
        load(hidden, m.width, layer.attention_norm, layer.q);
        const int64_t size = m.head_dim, wide = m.heads * size;
        multiply(layer.q, [&](int64_t r, int64_t i, float v) { shared.q[r * wide + i] = v; });
        multiply(layer.k, [&](int64_t r, int64_t i, float v) { place(layer.keys, r, i / size, positions[r])[i % size] = v; });
        multiply(layer.v, [&](int64_t r, int64_t i, float v) { place(layer.values, r, i / size, positions[r])[i % size] = v; });
    }

    void turn(const Layer& layer) {
        const int64_t size = m.head_dim, both = m.heads + m.kv_heads;
        const Share share(count * both, thread, threads);
        for (int64_t item = share.first; item < share.last; item++) {
            const int64_t r = item / both, head = item % both;
            const bool query = head < m.heads;
            float* states = query ? shared.q.data() + (r * m.heads + head) * size
                                  : place(layer.keys, r, head - m.heads, positions[r]);
            const float* norm = query ? layer.q_norm : layer.k_norm;
            if (norm) rms_norm(states, norm, size, m.eps, states);
            rotate(states, layer.rotation + positions[r] * size, size);
        }
    }

    void attend(const Layer& layer) {
        const int64_t size = m.head_dim, each = m.heads / m.kv_heads;
        const Share share(count * m.heads, thread, threads);
        for (int64_t item = share.first; item < share.last; item++) {
            const int64_t r = item / m.heads, head = item % m.heads, now = positions[r];
            const int64_t start = layer.window > 0 ? std::max<int64_t>(0, now - layer.window + 1) : 0, seen = now + 1 - start;
            const float* q = shared.q.data() + item * size;
            const float* keys = place(layer.keys, r, head / each, start);
            const float* values = place(layer.values, r, head / each, start);
            scores.resize(std::max<int64_t>(scores.size(), seen));
            float most = -3e38f, sum = 0;
            for (int64_t t = 0; t < seen; t++) {
                scores[t] = dot(q, keys + t * size, size) * m.scale;
                most = std::max(most, scores[t]);
            }
            for (int64_t t = 0; t < seen; t++) scores[t] = std::exp(scores[t] - most);
            for (int64_t t = 0; t < seen; t++) sum += scores[t];
            float* to = shared.attended.data() + item * size;
            std::fill(to, to + size, 0.f);
            for (int64_t t = 0; t < seen; t++) {
                const float weight = scores[t];
                const float* value = values + t * size;
                for (int64_t i = 0; i < size; i++) to[i] += weight * value[i];
            }
            for (int64_t i = 0; i < size; i++) to[i] /= sum;
        }
    }

    // hidden += w x, with a norm between where the model has one there.
    void add(const Matrix& w, const float* after) {
        if (!after) {
            multiply(w, [&](int64_t r, int64_t i, float v) { hidden[r * m.width + i] += v; });
        } else {
            multiply(w, [&](int64_t r, int64_t i, float v) { shared.change[r * m.width + i] = v; });
#pragma omp barrier
            const Share share(m.width, thread, threads);
            for (int64_t r = 0; r < count; r++) {
                const float* change = shared.change.data() + r * m.width;
                const float factor = 1.f / std::sqrt(dot(change, change, m.width) / (float)m.width + m.eps);
                for (int64_t i = share.first; i < share.last; i++) hidden[r * m.width + i] += change[i] * factor * after[i];
            }
        }
#pragma omp barrier
    }

    void feed_forward(const Layer& layer) {
        load(hidden, m.width, layer.feed_forward_norm, layer.gate);
        const Share share(m.inner, thread, threads);
        std::vector<float>& gate = scores;
        gate.resize(std::max<int64_t>(gate.size(), count));
        out.resize(count);
        for (int64_t i = share.first; i < share.last; i++) {
            row_times(layer.gate, i, x, gate.data());
            row_times(layer.up, i, x, out.data());
            for (int64_t r = 0; r < count; r++) shared.inner[r * m.inner + i] = activated(gate[r], m.gelu) * out[r];
        }
#pragma omp barrier
        load(shared.inner.data(), m.inner, nullptr, layer.down);
        add(layer.down, layer.after_feed_forward);
    }

    void run(int64_t first, int64_t last) {
        for (int64_t index = first; index < last; index++) {
            const Layer& layer = m.layers[index];
            project(layer);
#pragma omp barrier
            turn(layer);
#pragma omp barrier
            attend(layer);
#pragma omp barrier
            load(shared.attended.data(), m.heads * m.head_dim, nullptr, layer.o);
            add(layer.o, layer.after_attention);
            feed_forward(layer);
        }
    }
};

}  // namespace

// Layers `first` to `last` on `count` rows of hidden states, in place. Row r is the token at positions[r] of slot
// slots[r]; several tokens of one slot come in their order. Then the head on the last `told` rows.
extern "C" void chiasm_step(const void* model, int64_t first, int64_t last, float* hidden, int64_t count,
                            const int64_t* slots, const int64_t* positions, float* logits, int64_t told, int64_t threads) {
    const Model& m = *(const Model*)model;
    Shared shared;
    shared.q.resize(count * m.heads * m.head_dim), shared.attended.resize(shared.q.size());
    shared.inner.resize(count * m.inner), shared.change.resize(count * m.width);
#pragma omp parallel num_threads((int)threads)
    {
        Step step{m, hidden, count, slots, positions, shared, omp_get_thread_num(), omp_get_num_threads(), {}, {}, {}};
        step.run(first, last);
        if (told) {
            Step tail{m, hidden + (count - told) * m.width, told, slots, positions, shared, step.thread, step.threads, {}, {}, {}};
            tail.load(tail.hidden, m.width, m.norm, m.head);
            tail.multiply(m.head, [&](int64_t r, int64_t i, float v) { logits[r * m.head.rows + i] = v; });
        }
    }
}
