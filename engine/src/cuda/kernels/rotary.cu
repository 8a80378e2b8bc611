// Heads of q and k are normed where the model says so and turned by their position; k and v go to their pages. A block is a row.
//
// Bytes: a row of q, k and v is read and its q written back, f32; k and v go on as 16 bits or 8. A warp takes a head at a time; its
// elements wait in shared memory, where those of a pair find each other.

enum { ROTARY_THREADS = 256, MOST_DIM = 256 };

typedef struct {
    FIELD(float *, qkv);             // [rows][stride]: q, k, v
    FIELD(const u32 *, positions);   // [rows]
    FIELD(const u32 *, slots);       // [rows][2]: page, token in it
    FIELD(const float *, angles);    // [positions][pairs][2]: cosine, sine
    FIELD(const float *, q_norm);    // weights, or null
    FIELD(const float *, k_norm);
    FIELD(Pages, pages);
    FIELD(u32, stride);
    FIELD(u32, heads);
    FIELD(u32, pairs);               // the first 2 * pairs elements of a head turn
    FIELD(u32, interleaved);         // pairs are neighbours, else halves apart
    FIELD(u32, norm);                // 1 over the root mean square, 2 without its mean
    FIELD(u32, share);               // norm weights: 0 the same for each head, 1 each its own, 2 all heads are one vector
    FIELD(float, eps);
} RotaryArguments;

// What turns a vector into a normed one.
typedef struct { float mean, scale; } HeadMoments;

// Of all heads as one.
DEVICE HeadMoments whole_moments(const float *values, u32 count, u32 kind, float eps, float *room) {
    HeadMoments moments = {0.0f, 1.0f};
    float sum = 0.0f;
    u32 at;
    if (kind == 2) {
        for (at = THREAD; at < count; at += ROTARY_THREADS) sum += values[at];
        moments.mean = block_sum(sum, room) / (float)count;
        sum = 0.0f;
    }
    for (at = THREAD; at < count; at += ROTARY_THREADS) sum = fmaf(values[at] - moments.mean, values[at] - moments.mean, sum);
    moments.scale = 1.0f / sqrtf(block_sum(sum, room) / (float)count + eps);
    return moments;
}

// Of a head in a warp's hands.
DEVICE HeadMoments head_moments(const float *head, u32 dim, u32 kind, float eps) {
    HeadMoments moments = {0.0f, 1.0f};
    float sum = 0.0f;
    u32 at;
    if (kind == 2) {
        for (at = THREAD % WARP; at < dim; at += WARP) sum += head[at];
        moments.mean = warp_sum(sum) / (float)dim;
        sum = 0.0f;
    }
    for (at = THREAD % WARP; at < dim; at += WARP) sum = fmaf(head[at] - moments.mean, head[at] - moments.mean, sum);
    moments.scale = 1.0f / sqrtf(warp_sum(sum) / (float)dim + eps);
    return moments;
}

// An element of a head after it has turned.
DEVICE float turned(const RotaryArguments *args, const float *head, const float *angles, u32 at) {
    u32 pairs = args->pairs, pair, second;
    float cosine, sine;
    if (at >= 2 * pairs) return head[at];
    pair = args->interleaved ? at / 2 : at % pairs;
    second = args->interleaved ? at % 2 : at / pairs;
    cosine = angles[2 * pair];
    sine = angles[2 * pair + 1];
    if (args->interleaved) {
        pair = at / 2 * 2;
        return second ? head[pair + 1] * cosine + head[pair] * sine : head[pair] * cosine - head[pair + 1] * sine;
    }
    return second ? head[pair + pairs] * cosine + head[pair] * sine : head[pair] * cosine - head[pair + pairs] * sine;
}

KERNEL(rotary, RotaryArguments, ROTARY_THREADS, 4) {
    SHARED(room);
    u32 row = BLOCK_X, warp = THREAD / WARP, lane = THREAD % WARP, dim = args.pages.dim, kv_heads = args.pages.kv_heads, head, at;
    float *qkv = args.qkv + (u64)row * args.stride, *in = (float *)room + warp * 2 * MOST_DIM, *out = in + MOST_DIM;
    const float *angles = args.angles + (u64)args.positions[row] * args.pairs * 2;
    const u32 *slot = args.slots + 2 * (u64)row;
    HeadMoments whole[2] = {{0.0f, 1.0f}, {0.0f, 1.0f}};
    if (args.q_norm && args.share == 2) {
        whole[0] = whole_moments(qkv, args.heads * dim, args.norm, args.eps, (float *)room);
        whole[1] = whole_moments(qkv + args.heads * dim, kv_heads * dim, args.norm, args.eps, (float *)room);
        barrier();
    }
    for (head = warp; head < args.heads + 2 * kv_heads; head += ROTARY_THREADS / WARP) {
        float *from = qkv + head * dim;
        u32 is_key = head >= args.heads, own = is_key ? head - args.heads : head;
        if (head >= args.heads + kv_heads) {
            write_head(&args.pages, slot, own - kv_heads, from, args.pages.values, args.pages.value_scales);
            continue;
        }
        for (at = lane; at < dim; at += WARP) in[at] = from[at];
        warp_barrier();
        if (args.q_norm) {
            const float *weight = (is_key ? args.k_norm : args.q_norm) + (args.share ? own * dim : 0);
            HeadMoments moments = args.share == 2 ? whole[is_key] : head_moments(in, dim, args.norm, args.eps);
            for (at = lane; at < dim; at += WARP) in[at] = (in[at] - moments.mean) * moments.scale * weight[at];
            warp_barrier();
        }
        for (at = lane; at < dim; at += WARP) out[at] = turned(&args, in, angles, at);
        warp_barrier();
        if (is_key) write_head(&args.pages, slot, own, out, 0, args.pages.key_scales);
        else for (at = lane; at < dim; at += WARP) from[at] = out[at];
        warp_barrier();
    }
}
