// What stands around a product that the device's library computes: rows of eight bits before it, and what a linear does with sums behind it.

enum { PRODUCT_THREADS = 256 };

typedef struct {
    FIELD(const u16 *, from);  // [rows][stride] 16-bit floats
    FIELD(u8 *, to);           // [rows][width] e4m3, or signed integers
    FIELD(float *, scales);    // [rows]
    FIELD(u32, width);         // a multiple of 8
    FIELD(u32, stride);
    FIELD(u32, integers);
} NarrowArguments;

// Rounds a row to eight bits times the scale that makes its largest the largest there is. A row with a number that is none has a scale that is none. A
// block is a row, which is read twice, the second time from a cache.
KERNEL(narrow_rows, NarrowArguments, PRODUCT_THREADS, 4) {
    SHARED(room);
    const quad *from = (const quad *)(args.from + (u64)BLOCK_X * args.stride);
    u32 *to = (u32 *)(args.to + (u64)BLOCK_X * args.width), *largest = (u32 *)room, magnitude = 0, at, other;
    float most = args.integers ? 127.0f : 448.0f, scale, inverse;
    int mask, i;
    for (at = THREAD; at < args.width / 8; at += PRODUCT_THREADS) {
        quad q = from[at];
        UNROLL for (i = 0; i < 8; i++) {
            other = float_bits(wide((u16)(q.word[i / 2] >> i % 2 * 16))) & 0x7fffffffu;
            magnitude = other > magnitude ? other : magnitude;
        }
    }
    UNROLL for (mask = 16; mask; mask /= 2) {
        other = shuffle_xor_bits(magnitude, mask);
        magnitude = other > magnitude ? other : magnitude;
    }
    if (THREAD % WARP == 0) largest[THREAD / WARP] = magnitude;
    barrier();
    for (at = 0; at < PRODUCT_THREADS / WARP; at++) magnitude = largest[at] > magnitude ? largest[at] : magnitude;
    scale = bits_float(magnitude) / most;
    if (magnitude >= 0x7f800000u) scale = bits_float(0x7fc00000u);
    else if (scale < 1.17549435e-38f) scale = 1.17549435e-38f;
    inverse = 1.0f / scale;
    if (THREAD == 0) args.scales[BLOCK_X] = scale;
    for (at = THREAD; at < args.width / 8; at += PRODUCT_THREADS) {
        quad q = from[at];
        u32 words[2] = {0, 0};
        UNROLL for (i = 0; i < 8; i++) {
            float value = wide((u16)(q.word[i / 2] >> i % 2 * 16)) * inverse;
            u32 code = magnitude >= 0x7f800000u ? 0 : args.integers ? int8_from(value) : e4m3_from(value);
            words[i / 4] |= code << i % 4 * 8;
        }
        to[2 * at] = words[0];
        to[2 * at + 1] = words[1];
    }
}

typedef struct {
    FIELD(LinearArguments, linear);    // what follows its sums, and where they go
    FIELD(const u32 *, sums);          // [rows][panels * 64] f32, or integers
    FIELD(const float *, row_scales);  // [rows], or null: then there are no scales
    FIELD(const float *, scales);      // [panels * 64]
    FIELD(u32, integers);
} SumsArguments;

// Eight neighbouring sums of a row, from `column` on.
DEVICE void scaled_sums(const SumsArguments *args, u32 row, u32 column, float *sums) {
    const quad *from = (const quad *)(args->sums + (u64)row * args->linear.panels * PANEL + column);
    int at;
    UNROLL for (at = 0; at < 2; at++) {
        quad q = from[at];
        int i;
        UNROLL for (i = 0; i < 4; i++) sums[4 * at + i] = args->integers ? (float)(i32)q.word[i] : bits_float(q.word[i]);
    }
    if (args->row_scales) UNROLL for (at = 0; at < 8; at++) sums[at] *= args->row_scales[row] * args->scales[column + at];
}

// A thread takes eight outputs of a row, or as many gates.
KERNEL(end_sums, SumsArguments, PRODUCT_THREADS, 2) {
    u32 gated = args.linear.what == GATE, width = args.linear.panels * (gated ? 4 : 8);
    u64 unit = (u64)BLOCK_X * PRODUCT_THREADS + THREAD;
    u32 row = (u32)(unit / width), column = (u32)(unit % width) * 8;
    float sums[8], ups[8];
    if (row >= args.linear.rows) return;
    if (gated) {
        u32 panel = column / 32, within = column % 32;
        scaled_sums(&args, row, panel * PANEL + within, sums);
        scaled_sums(&args, row, panel * PANEL + 32 + within, ups);
        finish_gated(&args.linear, row, panel, within, sums, ups);
    } else {
        scaled_sums(&args, row, column, sums);
        finish(&args.linear, row, column, sums);
    }
}
