// What kernels of attention share: keys and values on their way from pages, and a softmax that runs over blocks of keys and is merged over parts.
//
// Scores are in units of log2. Probabilities are rounded as values are; what outputs are divided by is the sum of the rounded ones, or where
// elements have scales, which multiply probabilities before they are rounded, of the probabilities.

enum { KEYS = 64 };

// The factors by which a total and a part count when they are merged. Who has seen nothing changes nothing.
typedef struct { float largest, total, part; } Shares;

DEVICE Shares shares(float total, float part) {
    Shares shares = {total, 1.0f, 0.0f};
    if (part == -INFINITE) return shares;
    shares.largest = total > part ? total : part;
    shares.total = total == -INFINITE ? 0.0f : power2(total - shares.largest);
    shares.part = power2(part - shares.largest);
    return shares;
}

DEVICE float merged(float total, float part, Shares shares) {
    return shares.part == 0.0f ? total * shares.total : fmaf(total, shares.total, part * shares.part);
}

// Eight elements each, of outputs that a warp has: of all, or of some columns where warps share them.
#ifdef RANK_TILES
enum { STATE_TILES = 2 * RANK_TILES };
#else
enum { STATE_TILES = 2 * DIM_TILES };
#endif

// What 16 rows know, as a lane holds it: of rows g and g + 8 the largest score, the sum of probabilities (each lane's own until a part
// ends), and of each eight elements of the output columns 2 q, 2 q + 1 of both.
typedef struct { float largest[2], sum[2], out[STATE_TILES][4]; } State;

DEVICE void clear(State *state) {
    int at, i;
    UNROLL for (i = 0; i < 2; i++) {
        state->largest[i] = -INFINITE;
        state->sum[i] = 0.0f;
    }
    UNROLL for (at = 0; at < STATE_TILES; at++)
        UNROLL for (i = 0; i < 4; i++) state->out[at][i] = 0.0f;
}

// Ends a part: sums are those of all four lanes that share a row.
DEVICE void end_part(State *state) {
    int i;
    UNROLL for (i = 0; i < 2; i++) {
        state->sum[i] += shuffle_xor(state->sum[i], 1);
        state->sum[i] += shuffle_xor(state->sum[i], 2);
    }
}

// Turns scores of a warp's 16 rows and a block's keys, as `mma` leaves them, into probabilities as it takes them, and moves each row's
// softmax on: of rows g and g + 8 the largest score so far, and each lane's own sum; what came before counts by `factors`. Where elements are
// bytes, `scales` are those of the values.
DEVICE void soften(float (*scores)[4], const float *scales, float *largest, float *sum, float *factors, u32 (*probabilities)[2]) {
    u32 q = THREAD % WARP % 4;
    int i, tile, e;
    (void)q;
    (void)scales;
    UNROLL for (i = 0; i < 2; i++) {
        float most = -INFINITE, own = 0.0f, other, reference;
        UNROLL for (tile = 0; tile < KEYS / 8; tile++)
            UNROLL for (e = 0; e < 2; e++) most = scores[tile][2 * i + e] > most ? scores[tile][2 * i + e] : most;
        other = shuffle_xor(most, 1);
        most = other > most ? other : most;
        other = shuffle_xor(most, 2);
        most = other > most ? other : most;
        most = largest[i] > most ? largest[i] : most;
        reference = most == -INFINITE ? 0.0f : most;
        factors[i] = largest[i] == -INFINITE ? 1.0f : power2(largest[i] - reference);
        largest[i] = most;
        UNROLL for (tile = 0; tile < KEYS / 8; tile++) {
            float low = power2(scores[tile][2 * i] - reference), high = power2(scores[tile][2 * i + 1] - reference);
#if PAGES
            own += low + high;
            low *= scales[8 * tile + 2 * q];
            high *= scales[8 * tile + 2 * q + 1];
#endif
            probabilities[tile][i] = narrow_pair(low, high);
#if !PAGES
            own += wide((u16)probabilities[tile][i]) + wide((u16)(probabilities[tile][i] >> 16));
#endif
        }
        sum[i] = sum[i] * factors[i] + own;
    }
}

#if PAGES
// Widens four elements, without their scale.
DEVICE void widen_bytes(u32 bytes, u32 *to) {
    float value[4];
    int i;
    UNROLL for (i = 0; i < 4; i++) {
        u32 byte = bytes >> 8 * i & 0xff;
#if PAGES == 1
        // The exponent is too small by 120.
        value[i] = bits_float(((byte & 0x7f) << 20) | ((byte & 0x80) << 24)) * bits_float((127u + 120) << 23);
#else
        value[i] = (float)(i8)byte;
#endif
    }
    to[0] = narrow_pair(value[0], value[1]);
    to[1] = narrow_pair(value[2], value[3]);
}
#endif

// Brings the keys, or values, of a block's positions below `until` to shared memory, zeros for the others; `plane` and `scales` are bytes
// from a page's start. Rows have `chunks` times eight elements there, and the block has `threads` threads: both are constants.
DEVICE void load_block(const Pages *pages, u8 *to, u32 stride, float *scales_to, const u32 *table, u32 kv_head, u32 plane, u32 scales,
                       u32 first, u32 until, u32 chunks, u32 threads) {
    u32 dim = pages->dim, mask = (1u << pages->page_shift) - 1, at;
    for (at = THREAD; at < KEYS * chunks; at += threads) {
        u32 key = at / chunks, chunk = at % chunks * 8, position = first + key;
        int seen = position < until;
        const u8 *block = block_of(pages, seen ? table[position >> pages->page_shift] : 0);
        const u8 *from = block + plane + ((u64)place(pages, kv_head, position & mask) * dim + chunk) * ELEMENT_BYTES;
        u8 *at_to = to + (key * stride + chunk) * 2;
#if PAGES
        // Four bytes at a time, which dims are multiples of.
        u32 words[4] = {0, 0, 0, 0};
        if (seen && chunk < dim) widen_bytes(*(const u32 *)from, words);
        if (seen && chunk + 4 < dim) widen_bytes(*(const u32 *)(from + 4), words + 2);
        quad q = {{words[0], words[1], words[2], words[3]}};
        *(quad *)at_to = q;
        if (chunk == 0) {
            u16 bits = seen ? ((const u16 *)(block + scales))[place(pages, kv_head, position & mask)] : 0;
            scales_to[key] = bits_float((u32)bits << 16);
        }
#else
        if (dim % 8 == 0) copy_async(at_to, seen && chunk < dim ? (const void *)from : pages->layer, seen && chunk < dim);
        else {
            copy_async_8(at_to, seen && chunk < dim ? (const void *)from : pages->layer, seen && chunk < dim);
            copy_async_8(at_to + 8, seen && chunk + 4 < dim ? (const void *)(from + 8) : pages->layer, seen && chunk + 4 < dim);
        }
#endif
    }
#if !PAGES
    (void)scales_to;
    (void)scales;
#endif
}
