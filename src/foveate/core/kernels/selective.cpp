// The selective scan and its derivatives, for a block of channels at a time with all their states:
//
//     h_t = e^(dt_t A) h_{t-1} + dt_t x_t B_t    y_t = C_t . h_t
//
//     g_t = C_t dy_t + e^(dt_{t+1} A) g_{t+1}    q_t = g_t e^(dt_t A) h_{t-1}    g behind the last token: dlast
//     dx = dt (B . g)    ddt = x (B . g) + A . q    dA = sum_t dt q    dB = sum_e dt x g    dC = sum_e dy h
//
// States never stand in memory for the whole text. The forward pass leaves marks, the states before every stretch of
// tokens, and the backward pass makes those inside of a stretch again, from the last stretch to the first.
//
// A part is every n-th block of a batch entry. It sums up derivatives of B and C of its own, and these sums are added
// in order: the numbers do not depend on the count of threads.

#include "tiles.hpp"

// Mirrored field by field in native.py. Everything is contiguous; a null pointer means "not asked".
struct Selective {
    int64_t batch, time, inner, states, stretch, threads;  // stretch: tokens from mark to mark
    const float *dt, *x, *rate, *b, *c, *first;  // [batch, time, inner or states], rate [inner, states]; first as last
    float *y, *last;                             // [batch, time, inner], [batch, inner, states]
    float *marks;                                // [batch, stretches, blocks, CHANNELS * states]
    const float *dy, *dlast;
    float *d_dt, *d_x, *d_rate, *d_b, *d_c, *d_first;  // as what they belong to, but d_rate per batch entry
};

namespace {

// Channels of a block: what a token brings of them are whole cache lines. native.py counts on the number.
constexpr int64_t CHANNELS = 64;
constexpr int64_t PARTS = 8;  // at least so many parts, where there are blocks for them
static_assert(CHANNELS % PANEL == 0);

// What goes over one stretch with one panel of channels. Rows of dt, x, y and their derivatives are CHANNELS apart,
// those of states PANEL.
struct Walk {
    int64_t rows, states;
    const float *rate, *b, *c;  // rate in units of ln 2
    const float *dt, *x, *dy;
    float *h, *a, *y;           // state; in the backward pass those before each token and the last one, and all factors
    float *g, *d_rate, *d_b, *d_c, *d_dt, *d_x;  // d_b and d_c: one vector per token and state
};

// From the first token to the last. KEEP: every state and factor is kept, and nothing is read.
template <bool KEEP>
void onward(Walk w) {
    const int64_t ahead = KEEP ? w.states * PANEL : 0;
    for (int64_t t = 0; t < w.rows; ++t, w.b += w.states, w.c += w.states, w.h += ahead, w.a += ahead) {
        vf dt[LANES], u[LANES], y[LANES];
#pragma GCC unroll 8
        for (int v = 0; v < LANES; ++v) {
            dt[v] = load(w.dt + t * CHANNELS + v * LANE);
            u[v] = dt[v] * load(w.x + t * CHANNELS + v * LANE);
            y[v] = vf{};
        }
        for (int64_t n = 0; n < w.states; ++n) {
            const vf b = splat(w.b[n]), c = splat(w.c[n]);
            float *h = w.h + n * PANEL;
#pragma GCC unroll 8
            for (int v = 0; v < LANES; ++v) {
                const vf a = exp2(larger(splat(-150.0f), dt[v] * load(w.rate + n * PANEL + v * LANE)));
                const vf next = a * load(h + v * LANE) + u[v] * b;
                store(h + ahead + v * LANE, next);
                if (KEEP) store(w.a + n * PANEL + v * LANE, a);
                else y[v] += c * next;
            }
        }
#pragma GCC unroll 8
        for (int v = 0; !KEEP && v < LANES; ++v) store(w.y + t * CHANNELS + v * LANE, y[v]);
    }
}

// From the last token to the first, over what was kept; g comes with what is behind the stretch.
void back(const Walk w) {
    for (int64_t t = w.rows - 1; t >= 0; --t) {
        vf dt[LANES], u[LANES], dy[LANES], du[LANES], d_dt[LANES];
#pragma GCC unroll 8
        for (int v = 0; v < LANES; ++v) {
            dt[v] = load(w.dt + t * CHANNELS + v * LANE);
            u[v] = dt[v] * load(w.x + t * CHANNELS + v * LANE);
            dy[v] = load(w.dy + t * CHANNELS + v * LANE);
            du[v] = d_dt[v] = vf{};
        }
        for (int64_t n = 0; n < w.states; ++n) {
            const int64_t at = t * w.states + n;
            const vf b = splat(w.b[at]), c = splat(w.c[at]);
            const float *before = w.h + at * PANEL, *behind = before + w.states * PANEL, *rate = w.rate + n * PANEL;
            float *state = w.g + n * PANEL, *d_rate = w.d_rate + n * PANEL;
            vf d_b{}, d_c{};
#pragma GCC unroll 8
            for (int v = 0; v < LANES; ++v) {
                const vf g = load(state + v * LANE) + c * dy[v];
                const vf carried = g * load(w.a + at * PANEL + v * LANE);
                const vf q = carried * load(before + v * LANE);
                store(state + v * LANE, carried);
                du[v] += b * g;
                d_dt[v] += q * load(rate + v * LANE);
                store(d_rate + v * LANE, load(d_rate + v * LANE) + q * dt[v]);
                d_b += u[v] * g;
                d_c += dy[v] * load(behind + v * LANE);
            }
            store(w.d_b + at * LANE, load(w.d_b + at * LANE) + d_b);
            store(w.d_c + at * LANE, load(w.d_c + at * LANE) + d_c);
        }
#pragma GCC unroll 8
        for (int v = 0; v < LANES; ++v) {
            const vf x = load(w.x + t * CHANNELS + v * LANE);
            store(w.d_dt + t * CHANNELS + v * LANE, x * du[v] + d_dt[v] * splat(float(LN2)));
            store(w.d_x + t * CHANNELS + v * LANE, dt[v] * du[v]);
        }
    }
}

// Rows of a block's channels, CHANNELS apart, with zeros where it has fewer.
void gather(const float *from, int64_t pitch, int64_t rows, int64_t channels, float *to) {
    for (int64_t r = 0; r < rows; ++r, from += pitch, to += CHANNELS) {
        for (int64_t i = 0; channels == CHANNELS && i < CHANNELS; i += LANE) store(to + i, load(from + i));
        if (channels < CHANNELS) std::fill(std::copy_n(from, channels, to), to + CHANNELS, 0.0f);
    }
}

// The same the other way.
void scatter(const float *from, int64_t rows, int64_t channels, float *to, int64_t pitch) {
    for (int64_t r = 0; r < rows; ++r, from += CHANNELS, to += pitch) {
        for (int64_t i = 0; channels == CHANNELS && i < CHANNELS; i += LANE) store(to + i, load(from + i));
        if (channels < CHANNELS) std::copy_n(from, channels, to);
    }
}

// Calls `at` with the place of each number in [channels, states] and with the one in panels of [states, PANEL].
template <class At>
void each(int64_t channels, int64_t states, const At &at) {
    for (int64_t e = 0; e < channels; ++e)
        for (int64_t n = 0; n < states; ++n) at(e * states + n, (e / PANEL * states + n) * PANEL + e % PANEL);
}

// [channels, states] as panels, with zeros where the block has fewer channels.
void to_panels(const float *from, int64_t channels, int64_t states, float factor, float *to) {
    std::fill_n(to, CHANNELS * states, 0.0f);
    each(channels, states, [&](int64_t i, int64_t j) { to[j] = from[i] * factor; });
}

void from_panels(const float *from, int64_t channels, int64_t states, float *to) {
    each(channels, states, [&](int64_t i, int64_t j) { to[i] = from[j]; });
}

struct Block {
    int64_t batch, number, first, channels;
};

struct Scratch {
    Buffer<float> rate, h, a, g, d_rate, d_rates, dt, x, y, d_dt, d_x, d_b, d_c;
};

struct Scanning {
    const Selective &call;
    const int64_t blocks = (call.inner + CHANNELS - 1) / CHANNELS, numbers = CHANNELS * call.states;
    const int64_t stretches = (call.time + call.stretch - 1) / call.stretch;
    const int64_t read = call.time * call.states, padded = read + LANE;  // numbers of B; whole vectors are added up
    const int64_t parts = std::max<int64_t>(1, std::min(blocks, PARTS / std::max<int64_t>(1, call.batch)));

    explicit Scanning(const Selective &given) : call(given) {}
    bool forward() const;
    bool backward() const;
    void scan(const Block &t, Scratch &w) const;
    void derive(const Block &t, Scratch &w, float *d_b, float *d_c) const;

    Block block(int64_t batch, int64_t number) const {
        const int64_t first = number * CHANNELS;
        return {batch, number, first, std::min(CHANNELS, call.inner - first)};
    }
    int64_t state(const Block &t) const { return (t.batch * call.inner + t.first) * call.states; }
    int64_t token(const Block &t, int64_t s) const { return t.batch * call.time + s * call.stretch; }
    float *mark(const Block &t, int64_t s) const {
        return call.marks + ((t.batch * stretches + s) * blocks + t.number) * numbers;
    }
    int64_t rows(int64_t s) const { return std::min(call.stretch, call.time - s * call.stretch); }
};

bool Scanning::forward() const {
    return parallel(call.threads, call.batch * blocks, [&](auto next) {
        Scratch w;
        for (int64_t i; (i = next()) >= 0;) scan(block(i / blocks, i % blocks), w);
    });
}

void Scanning::scan(const Block &t, Scratch &w) const {
    const int64_t states = call.states, inner = call.inner, size = call.stretch * CHANNELS;
    float *rate = w.rate.need(numbers), *h = w.h.need(numbers);
    float *dt = w.dt.need(size), *x = w.x.need(size), *y = w.y.need(size);
    to_panels(call.rate + t.first * states, t.channels, states, LOG2E, rate);
    to_panels(call.first + state(t), t.channels, states, 1, h);
    for (int64_t s = 0; s < stretches; ++s) {
        const int64_t from = token(t, s), at = from * inner + t.first;
        if (call.marks) std::copy_n(h, numbers, mark(t, s));
        gather(call.dt + at, inner, rows(s), t.channels, dt);
        gather(call.x + at, inner, rows(s), t.channels, x);
        for (int64_t p = 0; p < t.channels; p += PANEL) {
            const Walk walk{rows(s), states, rate + p * states, call.b + from * states, call.c + from * states,
                            dt + p,  x + p,  nullptr,           h + p * states,         nullptr,
                            y + p};
            onward<false>(walk);
        }
        scatter(y, rows(s), t.channels, call.y + at, inner);
    }
    from_panels(h, t.channels, states, call.last + state(t));
}

bool Scanning::backward() const {
    Buffer<float> d_b, d_c;
    d_b.need(call.batch * parts * padded);
    d_c.need(call.batch * parts * padded);
    const bool good = parallel(call.threads, call.batch * parts, [&](auto next) {
        Scratch w;
        for (int64_t i; (i = next()) >= 0;) {
            std::fill_n(d_b.p + i * padded, padded, 0.0f);
            std::fill_n(d_c.p + i * padded, padded, 0.0f);
            for (int64_t n = i % parts; n < blocks; n += parts)
                derive(block(i / parts, n), w, d_b.p + i * padded, d_c.p + i * padded);
        }
    });
    return good && parallel(call.threads, 2 * call.batch, [&](auto next) {
        for (int64_t i; (i = next()) >= 0;) {
            const float *from = (i % 2 ? d_c : d_b).p + i / 2 * parts * padded;
            float *to = (i % 2 ? call.d_c : call.d_b) + i / 2 * read;
            std::copy_n(from, read, to);
            for (int64_t n = 1; n < parts; ++n)
                for (int64_t j = 0; j < read; ++j) to[j] += from[n * padded + j];
        }
    });
}

void Scanning::derive(const Block &t, Scratch &w, float *d_b, float *d_c) const {
    const int64_t states = call.states, inner = call.inner, size = call.stretch * CHANNELS;
    const int64_t most = call.stretch * states;  // states of a stretch and a channel
    float *rate = w.rate.need(numbers), *g = w.g.need(numbers);
    float *d_rate = w.d_rate.need(numbers), *d_rates = w.d_rates.need(numbers);
    float *h = w.h.need((most + states) * PANEL), *a = w.a.need(most * PANEL);
    float *dt = w.dt.need(size), *x = w.x.need(size), *dy = w.y.need(size);
    float *d_dt = w.d_dt.need(size), *d_x = w.d_x.need(size);
    float *sum_b = w.d_b.need((most + LANE) * LANE), *sum_c = w.d_c.need((most + LANE) * LANE);
    to_panels(call.rate + t.first * states, t.channels, states, LOG2E, rate);
    to_panels(call.dlast + state(t), t.channels, states, 1, g);
    std::fill_n(d_rates, numbers, 0.0f);
    for (int64_t s = stretches - 1; s >= 0; --s) {
        const int64_t from = token(t, s), at = from * inner + t.first, some = rows(s) * states;
        gather(call.dt + at, inner, rows(s), t.channels, dt);
        gather(call.x + at, inner, rows(s), t.channels, x);
        gather(call.dy + at, inner, rows(s), t.channels, dy);
        // the sums of one stretch are small beside those of the text, and keep their digits
        std::fill_n(d_rate, numbers, 0.0f);
        std::fill_n(sum_b, (some + LANE) * LANE, 0.0f);
        std::fill_n(sum_c, (some + LANE) * LANE, 0.0f);
        for (int64_t p = 0; p < t.channels; p += PANEL) {
            std::copy_n(mark(t, s) + p * states, states * PANEL, h);
            const Walk walk{rows(s), states, rate + p * states, call.b + from * states, call.c + from * states,
                            dt + p,  x + p,  dy + p,            h,                      a,
                            nullptr, g + p * states, d_rate + p * states, sum_b, sum_c, d_dt + p, d_x + p};
            onward<true>(walk);
            back(walk);
        }
        for (int64_t i = 0; i < numbers; ++i) d_rates[i] += d_rate[i];
        float *to_b = d_b + s * most, *to_c = d_c + s * most;
        for (int64_t i = 0; i < some; i += LANE) {
            vf each_b[LANE], each_c[LANE];
            for (int j = 0; j < LANE; ++j) {
                each_b[j] = load(sum_b + (i + j) * LANE);
                each_c[j] = load(sum_c + (i + j) * LANE);
            }
            store(to_b + i, load(to_b + i) + totals<LANE>(each_b));
            store(to_c + i, load(to_c + i) + totals<LANE>(each_c));
        }
        scatter(d_dt, rows(s), t.channels, call.d_dt + at, inner);
        scatter(d_x, rows(s), t.channels, call.d_x + at, inner);
    }
    from_panels(g, t.channels, states, call.d_first + state(t));
    from_panels(d_rates, t.channels, states, call.d_rate + state(t));
}

}  // namespace

API int64_t foveate_selective_size() { return sizeof(Selective); }

// Zero when everything went well, otherwise memory ran out.
API int foveate_selective(const Selective *call) {
    try {
        return Scanning(*call).forward() ? 0 : 1;
    } catch (...) {
        return 1;
    }
}

API int foveate_selective_back(const Selective *call) {
    try {
        return Scanning(*call).backward() ? 0 : 1;
    } catch (...) {
        return 1;
    }
}
