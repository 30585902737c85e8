// One step of a Llama-shaped decoder over a static KV cache: every layer and the head in one parallel region.
//
// Weights are float32, int8 with a scale for each 32, or int4 with a scale and a minimum for each 32. Activations meet
// int8 and int4 weights as int16 with a scale for each 32 of their own, so that all of the cost is in the weights.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>
#include <vector>
#include <omp.h>
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define WIDE 1
#endif
#ifdef __AVX__
#define LANES 8
#else
#define LANES 4
#endif
#define UNROLLED _Pragma("GCC unroll 8")

namespace {

constexpr int64_t GROUP = 32;
constexpr int64_t TOGETHER = 8;
constexpr int64_t SPINS = 20000;
#ifdef __AVX512VL__
constexpr int SUMS = 16;  // vectors that fit in the registers beside what is read
#else
constexpr int SUMS = 8;
#endif
constexpr float LARGEST = 32767.f;
enum Kind : int64_t { FLOAT32 = 0, INT8 = 1, INT4 = 2 };

struct Matrix {
    const void* data;
    const uint16_t* scales;
    const uint16_t* minima;
    const float* bias;
    const uint16_t *down, *up;  // halves; their product, of a low rank, is added to the weights
    int64_t kind, rows, columns, rank;
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
    std::vector<float> values, scales, sums, thin;
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
inline float from_half(uint16_t bits) { return _cvtsh_ss(bits); }
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

// The same where a is in half precision.
inline float dot(const uint16_t* a, const float* b, int64_t size) {
    float sum = 0;
    int64_t i = 0;
#ifdef WIDE
    __m256 s0 = _mm256_setzero_ps(), s1 = s0;
    for (; i + 16 <= size; i += 16) {
        s0 = _mm256_fmadd_ps(from_halves(a + i, 8), _mm256_loadu_ps(b + i), s0);
        s1 = _mm256_fmadd_ps(from_halves(a + i + 8, 8), _mm256_loadu_ps(b + i + 8), s1);
    }
    sum = total(_mm256_add_ps(s0, s1));
#endif
    for (; i < size; i++) sum += from_half(a[i]) * b[i];
    return sum;
}

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));

inline Vector load(const float* from) {
    Vector x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

// R rows of a float32 matrix times N rows of activations. Several rows are fetched ahead: the processor itself sees far
// enough only along one.
template <int R, int N>
inline void times_float(const float* w, const float* x, int64_t columns, float* out, int64_t stride) {
    Vector sums[R][N] = {};
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) {
        Vector weights[R];
        UNROLLED for (int r = 0; r < R; r++) {
            weights[r] = load(w + r * columns + i);
            if (R > 1) __builtin_prefetch(w + (r + R) * columns + i);
        }
        UNROLLED for (int n = 0; n < N; n++) {
            const Vector here = load(x + n * columns + i);
            UNROLLED for (int r = 0; r < R; r++) sums[r][n] += weights[r] * here;
        }
    }
    UNROLLED for (int r = 0; r < R; r++)
        UNROLLED for (int n = 0; n < N; n++) {
            float sum = 0;
            for (int lane = 0; lane < LANES; lane++) sum += sums[r][n][lane];
            for (int64_t j = i; j < columns; j++) sum += w[r * columns + j] * x[n * columns + j];
            out[r * stride + n] = sum;
        }
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
    for (int64_t k = 0; k < w.rank; k += TOGETHER) {
        const __m256 up = from_halves(w.up + index * w.rank + k, std::min(TOGETHER, w.rank - k));
        for (int n = 0; n < N; n++)
            sums[n] = _mm256_fmadd_ps(up, _mm256_loadu_ps(x.thin.data() + (first + n) * w.rank + k), sums[n]);
    }
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
        out[n] = dot(w.up + index * w.rank, x.thin.data() + (first + n) * w.rank, w.rank);
        for (int64_t g = 0; g < groups; g++) {
            const int64_t place = n * groups + g;
            out[n] += Group<KIND>(data + g * bytes).times(q + place * GROUP) * from_half(scales[g]) * sx[place];
            if (KIND == INT4) out[n] += from_half(minima[g]) * sum[place];
        }
    }
#endif
}

// out[r * stride + n] = row `index + r` of w times row `first + n` of x.
template <int R, int N>
inline void times(const Matrix& w, int64_t index, const Rows& x, int64_t first, float* out, int64_t stride) {
    if (w.kind == FLOAT32)
        times_float<R, N>((const float*)w.data + index * w.columns, x.values.data() + first * w.columns, w.columns, out, stride);
    for (int r = 0; r < R; r++) {
        if (w.kind == INT8) times_groups<INT8, N>(w, index + r, x, first, out + r * stride);
        if (w.kind == INT4) times_groups<INT4, N>(w, index + r, x, first, out + r * stride);
        for (int n = 0; n < N && w.bias; n++) out[r * stride + n] += w.bias[index + r];
    }
}

// The same for all rows of x; those of weights are read from memory once.
template <int R>
inline void rows_times(const Matrix& w, int64_t index, const Rows& x, float* out) {
    int64_t n = 0;
    if (R * 8 <= SUMS)
        for (; n + 8 <= x.count; n += 8) times<R, 8>(w, index, x, n, out + n, x.count);
    for (; n + 4 <= x.count; n += 4) times<R, 4>(w, index, x, n, out + n, x.count);
    for (; n + 2 <= x.count; n += 2) times<R, 2>(w, index, x, n, out + n, x.count);
    for (; n < x.count; n++) times<R, 1>(w, index, x, n, out + n, x.count);
}

// One row of a quantised matrix in float32.
template <int KIND>
inline void unpack(const Matrix& w, int64_t index, float* out) {
    const int64_t groups = (w.columns + GROUP - 1) / GROUP, bytes = KIND == INT8 ? GROUP : GROUP / 2;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t place = index * groups + g;
        const uint8_t* data = (const uint8_t*)w.data + place * bytes;
        const float scale = from_half(w.scales[place]), minimum = KIND == INT4 ? from_half(w.minima[place]) : 0.f;
        float values[GROUP];
        for (int i = 0; i < GROUP / 2; i++) {
            values[i] = KIND == INT8 ? (float)(int8_t)data[i] * scale : (float)(data[i] & 15) * scale + minimum;
            values[i + 16] = KIND == INT8 ? (float)(int8_t)data[i + 16] * scale : (float)(data[i] >> 4) * scale + minimum;
        }
        std::memcpy(out + g * GROUP, values, std::min(GROUP, w.columns - g * GROUP) * sizeof(float));
    }
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

// Waits actively for a while. OpenMP's own barrier sleeps wherever the process has more threads than cores, as a server
// has, and waking up costs as much as a layer.
struct Barrier {
    std::atomic<int64_t> arrived{0}, round{0};

    void wait(int64_t threads) {
        const int64_t now = round.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int64_t spins = 0; round.load(std::memory_order_acquire) == now; spins++)
            if (spins > SPINS) std::this_thread::yield();
    }
};

// All that threads share during a call.
struct Shared {
    Barrier barrier;
    std::vector<float> q, attended, inner, change;
};

struct Step {
    const Model& m;
    float* hidden;
    const int64_t count;
    const int64_t *slots, *positions, *angles;
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

    void meet() { shared.barrier.wait(threads); }

    template <class Put>
    void multiply(const Matrix& w, Put put) {
        const Share share(w.rows, thread, threads);
        int64_t i = share.first;
        out.resize(2 * count), x.thin.resize(count * w.rank + TOGETHER);
        for (int64_t k = 0; k < w.rank; k++)  // by every thread for itself, which costs less than to meet
            for (int64_t n = 0; n < count; n++) x.thin[n * w.rank + k] = dot(w.down + k * w.columns, x.row(n), w.columns);
        const auto tiles = [&](auto rows) {
            constexpr int R = decltype(rows)::value;
            for (; i + R <= share.last; i += R) {
                rows_times<R>(w, i, x, out.data());
                for (int r = 0; r < R; r++)
                    for (int64_t n = 0; n < count; n++) put(n, i + r, out[r * count + n]);
            }
        };
        if (count > 3) tiles(std::integral_constant<int, 2>());
        tiles(std::integral_constant<int, 1>());
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
            rotate(states, layer.rotation + angles[r] * size, size);
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
            meet();
            const Share share(m.width, thread, threads);
            for (int64_t r = 0; r < count; r++) {
                const float* change = shared.change.data() + r * m.width;
                const float factor = 1.f / std::sqrt(dot(change, change, m.width) / (float)m.width + m.eps);
                for (int64_t i = share.first; i < share.last; i++) hidden[r * m.width + i] += change[i] * factor * after[i];
            }
        }
        meet();
    }

    void feed_forward(const Layer& layer) {
        load(hidden, m.width, layer.feed_forward_norm, layer.gate);
        multiply(layer.gate, [&](int64_t r, int64_t i, float v) { shared.inner[r * m.inner + i] = v; });
        multiply(layer.up, [&](int64_t r, int64_t i, float v) {
            float& inner = shared.inner[r * m.inner + i];
            inner = activated(inner, m.gelu) * v;
        });
        meet();
        load(shared.inner.data(), m.inner, nullptr, layer.down);
        add(layer.down, layer.after_feed_forward);
    }

    void run(int64_t first, int64_t last) {
        for (int64_t index = first; index < last; index++) {
            const Layer& layer = m.layers[index];
            project(layer);
            meet();
            turn(layer);
            meet();
            attend(layer);
            meet();
            load(shared.attended.data(), m.heads * m.head_dim, nullptr, layer.o);
            add(layer.o, layer.after_attention);
            feed_forward(layer);
        }
    }
};

}  // namespace

// Layers `first` to `last` on `count` rows of hidden states, in place. Row r is the token at positions[r] of slot
// slots[r], turned by angles[r]; several tokens of one slot come in their order. Then the head on the last `told` rows.
extern "C" void chiasm_step(const void* model, int64_t first, int64_t last, float* hidden, int64_t count,
                            const int64_t* slots, const int64_t* positions, const int64_t* angles, float* logits,
                            int64_t told, int64_t threads) {
    const Model& m = *(const Model*)model;
    Shared shared;
    shared.q.resize(count * m.heads * m.head_dim), shared.attended.resize(shared.q.size());
    shared.inner.resize(count * m.inner), shared.change.resize(count * m.width);
#pragma omp parallel num_threads((int)threads)
    {
        Step step{m, hidden, count, slots, positions, angles, shared, omp_get_thread_num(), omp_get_num_threads(), {}, {}, {}};
        step.run(first, last);
        if (told) {
            Step tail{m, hidden + (count - told) * m.width, told, slots, positions, angles, shared, step.thread, step.threads, {}, {}, {}};
            tail.load(tail.hidden, m.width, m.norm, m.head);
            tail.multiply(m.head, [&](int64_t r, int64_t i, float v) { logits[r * m.head.rows + i] = v; });
        }
    }
}

// Rows `first` to `last` of a quantised matrix in float32.
extern "C" void chiasm_unpack(const void* matrix, int64_t first, int64_t last, float* out, int64_t threads) {
    const Matrix& w = *(const Matrix*)matrix;
#pragma omp parallel for num_threads((int)threads)
    for (int64_t row = first; row < last; row++) {
        float* to = out + (row - first) * w.columns;
        if (w.kind == INT8) unpack<INT8>(w, row, to);
        else unpack<INT4>(w, row, to);
    }
}
