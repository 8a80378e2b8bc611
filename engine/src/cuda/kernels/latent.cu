// Latent attention (engine/src/model/latent.rs): keys on their way to pages, and queries on theirs to what they meet there. Blocks are rows.
//
// Bytes: a key is a latent and a turned part, 576 elements of DeepSeek's, and a warp has it; the queries of a row, 192 elements of each of up to
// 128 heads, are read once as f32 and written once as 16-bit floats. Pairs that turn are neighbours.

DEVICE u32 turned_pair(const float *pair, const float *angle) {
    return narrow_pair(pair[0] * angle[0] - pair[1] * angle[1], pair[1] * angle[0] + pair[0] * angle[1]);
}

typedef struct {
    FIELD(const float *, from);     // [rows][stride]: a latent, then what turns
    FIELD(const u32 *, positions);  // [rows]
    FIELD(const u32 *, slots);      // [rows][2]: page, token in it
    FIELD(const float *, angles);   // [positions][(dim - rank) / 2][2]: cosine, sine
    FIELD(const float *, norm);     // [rank]
    FIELD(Pages, pages);            // of one head, a key
    FIELD(u32, stride);
    FIELD(u32, rank);
    FIELD(float, eps);
} LatentKeysArguments;

// Norms latents over their root mean square, turns what follows them, and writes both to pages.
KERNEL(latent_keys, LatentKeysArguments, WARP, 16) {
    SHARED(room);
    float *key = (float *)room, sum = 0.0f, scale;
    u32 rank = args.rank, turning = args.pages.dim - rank, at;
    const float *from = args.from + (u64)BLOCK_X * args.stride, *angles = args.angles + (u64)args.positions[BLOCK_X] * turning;
    for (at = THREAD; at < rank; at += WARP) sum = fmaf(from[at], from[at], sum);
    scale = 1.0f / sqrtf(warp_sum(sum) / (float)rank + args.eps);
    for (at = THREAD; at < rank; at += WARP) key[at] = from[at] * scale * args.norm[at];
    for (at = 2 * THREAD; at < turning; at += 2 * WARP) {
        float low = from[rank + at], high = from[rank + at + 1];
        key[rank + at] = low * angles[at] - high * angles[at + 1];
        key[rank + at + 1] = high * angles[at] + low * angles[at + 1];
    }
    warp_barrier();
    write_head(&args.pages, args.slots + 2 * (u64)BLOCK_X, 0, key, 0, args.pages.key_scales);
}

typedef struct {
    FIELD(const float *, from);     // [rows][stride]: heads, each what meets latents and then what turns
    FIELD(const u32 *, rows);       // [rows]: which of the positions is a row's, or null: its own
    FIELD(const u32 *, positions);
    FIELD(const float *, angles);   // [positions][turning / 2][2]: cosine, sine
    FIELD(u16 *, plain);            // [rows][heads][plain_stride], zero beyond the width
    FIELD(u16 *, q);                // [rows][heads][rank + turning]: the last of each
    FIELD(u32, stride);
    FIELD(u32, heads);
    FIELD(u32, width);              // of what meets latents
    FIELD(u32, plain_stride);
    FIELD(u32, rank);
    FIELD(u32, turning);
} LatentQueriesArguments;

enum { LATENT_THREADS = 256 };

// Parts queries: what meets latents becomes the input of a linear, and the rest turns and goes to its place. A warp has a head at a time.
KERNEL(latent_queries, LatentQueriesArguments, LATENT_THREADS, 4) {
    u32 head, at, row = args.rows ? args.rows[BLOCK_X] : BLOCK_X;
    const float *angles = args.angles + (u64)args.positions[row] * args.turning;
    for (head = THREAD / WARP; head < args.heads; head += LATENT_THREADS / WARP) {
        const float *from = args.from + (u64)BLOCK_X * args.stride + head * (args.width + args.turning);
        u64 own = (u64)BLOCK_X * args.heads + head;
        u32 *plain = (u32 *)(args.plain + own * args.plain_stride);
        u32 *q = (u32 *)(args.q + own * (args.rank + args.turning) + args.rank);
        for (at = 2 * (THREAD % WARP); at < args.plain_stride; at += 2 * WARP)
            plain[at / 2] = at < args.width ? narrow_pair(from[at], from[at + 1]) : 0;
        for (at = 2 * (THREAD % WARP); at < args.turning; at += 2 * WARP)
            q[at / 2] = turned_pair(from + args.width + at, angles + at);
    }
}
