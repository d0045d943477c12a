// Rows of floats as small integers in a grid of their own; packed.py says what they mean.
//
// Four rows at a time are rotated, group by group, and coded where they stand: nothing of them is written that is not
// kept. The numbers do not depend on the count of threads.

#include "tiles.hpp"

// Mirrored field by field in native.py. Everything is contiguous.
struct Pack {
    int64_t rows, width, groups, size, bits, threads;
    const float *from;  // [rows, width]
    const float *turn;  // the rotation of a group, [size, size]
    uint8_t *codes;     // [rows, groups * size * bits / 8]
    uint16_t *grid;     // [rows, 2, groups], middles and steps in bfloat16
};

namespace {

constexpr int TOGETHER = 4;
constexpr int64_t PART = 256;  // rows
constexpr int64_t ALONE = 1 << 16;  // channels, below which a thread costs more than it saves

// The nearest bfloat16, the even one of two.
INLINE uint16_t narrowed(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof x);
    if (x != x) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

struct Packing {
    const Pack &p;
    const int64_t wide = (p.size + LANE - 1) / LANE * LANE, breadth = p.groups * p.size;
    const float top = float((1 << p.bits) - 1);
    Buffer<float> turn;  // rows filled up with zeros to whole vectors

    explicit Packing(const Pack &pack) : p(pack) {
        std::fill_n(turn.need(p.size * wide), p.size * wide, 0.0f);
        for (int64_t i = 0; i < p.size; ++i) std::copy_n(p.turn + i * p.size, p.size, turn.p + i * wide);
    }

    bool run() const {
        const int64_t threads = p.rows * p.width < ALONE ? 1 : std::max<int64_t>(1, p.threads);
        return parallel(threads, (p.rows + PART - 1) / PART, [&](auto next) {
            for (int64_t i; (i = next()) >= 0;)
                for (int64_t r = i * PART; r < std::min((i + 1) * PART, p.rows); r += TOGETHER)
                    some(r, std::min<int64_t>(TOGETHER, p.rows - r));
        });
    }

    void some(int64_t first, int64_t count) const {
        float x[TOGETHER * WIDEST] = {}, y[TOGETHER * WIDEST];
        int32_t code[TOGETHER][WIDEST];
        for (int64_t r = 0; r < count; ++r) std::copy_n(p.from + (first + r) * p.width, p.width, x + r * WIDEST);
        for (int64_t g = 0; g < p.groups; ++g) {
            for (int64_t c = 0; c < wide; c += LANE) {
                vf acc[TOGETHER][1] = {};
                multiply<TOGETHER, 1>(acc, x + g * p.size, WIDEST, 1, turn.p + c, wide, p.size);
                for (int r = 0; r < TOGETHER; ++r) store(y + r * WIDEST + c, acc[r][0]);
            }
            for (int64_t r = 0; r < count; ++r) coded(y + r * WIDEST, first + r, g, code[r] + g * p.size);
        }
        for (int64_t r = 0; r < count; ++r) written(code[r], p.codes + (first + r) * breadth * p.bits / 8);
    }

    // The codes of a group, and its middle and step.
    void coded(float *y, int64_t row, int64_t g, int32_t *code) const {
        float low = y[0], high = y[0], odd = 0;
        for (int64_t d = 0; d < p.size; ++d) {
            low = y[d] < low ? y[d] : low, high = y[d] > high ? y[d] : high;
            odd += y[d] * 0;  // what is not a number shows in the middle
        }
        uint16_t *grid = p.grid + row * 2 * p.groups + g;
        const float middle = widened(grid[0] = narrowed((low + high) / 2 + odd));
        const float reach = high - middle > middle - low ? high - middle : middle - low;
        const float step = widened(grid[p.groups] = narrowed(reach * 2 / top));
        const float by = std::max(step, std::numeric_limits<float>::min());
        for (int64_t d = 0; d < p.size; ++d) {
            const float z = (y[d] - middle) / by + top / 2;
            const float cut = z > 0 ? (z < top ? z : top) : 0;
            code[d] = int32_t((cut + 12582912.0f) - 12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
        }
    }

    void written(const int32_t *code, uint8_t *to) const {
        if (p.bits == 8)
            for (int64_t d = 0; d < breadth; ++d) to[d] = code[d];
        else
            for (int64_t d = 0; d < breadth / 2; ++d) to[d] = code[d] | code[breadth / 2 + d] << 4;
    }
};

}  // namespace

API int64_t foveate_pack_size() { return sizeof(Pack); }

// Zero when everything went well, otherwise memory ran out.
API int foveate_pack(const Pack *pack) {
    try {
        return Packing(*pack).run() ? 0 : 1;
    } catch (...) {
        return 1;
    }
}
