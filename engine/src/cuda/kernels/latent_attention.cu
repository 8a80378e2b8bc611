// Attention over pages of latents: all heads share one key, up to 576 elements, whose first, up to 512, are its value.
//
// Positions are cut as in `attention.cu`, into blocks of 64 keys and parts of 1024, counted from position 0; a part begins from nothing, and
// parts are merged from first to last, whether one block of threads goes through all of them or each has its own and
// `latent_attention_merge` puts them together. So a query's bits depend on its position alone.
//
// Row r of a sequence is head r % heads of token r / heads. Sixteen rows belong to four warps, and a block has 16 * ROW_TILES. Each of the
// four multiplies them with 16 keys of a block; scores meet in shared memory, all four make the same probabilities of them, and each has a
// quarter of the value's columns. What a lane has of them is 64 sums for values of 512, and as many of the parts before. A key is brought to shared
// memory once and is a value there as well: rows are 8 elements apart beyond their width, so that eight of them fall into different banks for
// `ldmatrix`, as keys and, transposed, as values.
//
// Bytes and products: a block of keys is 72 KiB of bf16 pages, and for 32 rows 1088 products of 2048 multiply-adds, 1088 cycles of an H100 at most
// (2048 a cycle; `mma.sync` reaches about 62 % of that). Operands are 416 KiB from shared memory, 3328 cycles at 128 bytes: that is what bounds prompts.
// One token of a sequence is bound by memory where heads are few, and reads its keys from the second-level cache for every 32 heads further.

enum {
    WIDTH = 16 * KEY_TILES > 64 * RANK_TILES ? 16 * KEY_TILES : 64 * RANK_TILES,
    ROW_STRIDE = WIDTH + 8,
    PART_BLOCKS = 16,
    COLUMN_WARPS = 4,
    BLOCK_ROWS = 16 * ROW_TILES,
    BLOCK_THREADS = ROW_TILES * COLUMN_WARPS * WARP,
    SCORE_STRIDE = KEYS + 8,
    QUERY_BYTES = BLOCK_ROWS * ROW_STRIDE * 2,
    SCORE_BYTES = BLOCK_ROWS * SCORE_STRIDE * 4,
    STAGE_BYTES = KEYS * ROW_STRIDE * 2 + (PAGES ? KEYS * 4 : 0),
    STATE_FLOATS = 8 * RANK_TILES + 4
};

typedef struct {
    FIELD(const u16 *, q);          // [rows][heads][pages.dim]
    FIELD(const u32 *, sequences);  // [sequences][4]: first row, rows, position of the first, start of its page table
    FIELD(const u32 *, tables);     // page ids
    FIELD(u16 *, to);               // [rows][heads][to_stride]; what is beyond the rank stays
    FIELD(float *, states);         // [parts][GRID_X][STATE_FLOATS][BLOCK_THREADS]; null where `parts` is 1
    FIELD(Pages, pages);
    FIELD(u32, sequence_count);
    FIELD(u32, heads);
    FIELD(u32, rank);               // elements of a value
    FIELD(u32, to_stride);
    FIELD(u32, parts);              // parts that have blocks of their own; 1 = none
    FIELD(float, scale);            // of scores
} LatentAttentionArguments;

// Adds a part that has ended to the total of those before it.
DEVICE void merge_part(State *total, const State *part) {
    Shares share[2];
    int at, i;
    UNROLL for (i = 0; i < 2; i++) {
        share[i] = shares(total->largest[i], part->largest[i]);
        total->largest[i] = share[i].largest;
        total->sum[i] = merged(total->sum[i], part->sum[i], share[i]);
    }
    UNROLL for (at = 0; at < 2 * RANK_TILES; at++)
        UNROLL for (i = 0; i < 4; i++) total->out[at][i] = merged(total->out[at][i], part->out[at][i], share[i / 2]);
}

// What a block of threads has: some rows of a sequence, which see what comes before `until`.
typedef struct { u32 sequence[4], first, rows, until; } Tile;

// Finds the tile of number `index` over all sequences; none has no rows.
DEVICE Tile tile_at(const LatentAttentionArguments *args, u32 index) {
    Tile tile = {{0, 0, 0, 0}, 0, 0, 0};
    u32 number, i;
    for (number = 0; number < args->sequence_count; number++) {
        u32 rows = args->sequences[4 * number + 1] * args->heads, tiles = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, last;
        if (index >= tiles) {
            index -= tiles;
            continue;
        }
        for (i = 0; i < 4; i++) tile.sequence[i] = args->sequences[4 * number + i];
        tile.rows = rows;
        // Later tokens see more: the longest start first.
        tile.first = (tiles - 1 - index) * BLOCK_ROWS;
        last = (tile.first + BLOCK_ROWS < rows ? tile.first + BLOCK_ROWS : rows) - 1;
        tile.until = tile.sequence[2] + last / args->heads + 1;
        break;
    }
    return tile;
}

// Writes outputs of a warp's rows: `tiles` times eight columns, from `column` on.
DEVICE void write_out(const LatentAttentionArguments *args, const Tile *tile, const float *sum, float (*out)[4], u32 column, int tiles) {
    u32 lane = THREAD % WARP, first = tile->first + THREAD / (COLUMN_WARPS * WARP) * 16;
    int i, at;
    column += lane % 4 * 2;
    UNROLL for (i = 0; i < 2; i++) {
        u32 row = first + lane / 4 + 8 * i;
        if (row >= tile->rows) continue;
        float inverse = 1.0f / sum[i];
        u16 *to = args->to + ((u64)tile->sequence[0] * args->heads + row) * args->to_stride;
        UNROLL for (at = 0; at < tiles; at++)
            if (8 * at + column < args->rank) *(u32 *)(to + 8 * at + column) = narrow_pair(out[at][2 * i] * inverse, out[at][2 * i + 1] * inverse);
    }
}

DEVICE u32 first_column(void) { return THREAD / WARP % COLUMN_WARPS * (16 * RANK_TILES); }

// Multiplies a warp's rows, `queries`, with its 16 keys of a block, and leaves the scores in `to`, `[16][SCORE_STRIDE]`.
DEVICE void score_keys(const u16 *queries, const u16 *keys, float *to) {
    u32 lane = THREAD % WARP, first = THREAD / WARP % COLUMN_WARPS * 16;
    const u16 *row = queries + lane % 16 * ROW_STRIDE + lane / 16 * 8;
    const u16 *key = keys + (first + lane % 8 + lane / 16 * 8) * ROW_STRIDE + lane / 8 % 2 * 8;
    float scores[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
    int k, tile, i;
    UNROLL for (k = 0; k < KEY_TILES; k++) {
        u32 rows[4], columns[4];
        load_matrices(rows, row + 16 * k);
        load_matrices(columns, key + 16 * k);
        mma(scores[0], rows, columns);
        mma(scores[1], rows, columns + 2);
    }
    UNROLL for (tile = 0; tile < 2; tile++)
        UNROLL for (i = 0; i < 4; i++) to[(lane / 4 + i / 2 * 8) * SCORE_STRIDE + first + 8 * tile + lane % 4 * 2 + i % 2] = scores[tile][i];
}

// Adds a block of keys to the state of a warp's rows, whose scores are `from`; `positions` are those of rows g and g + 8, -1 for a row that is none.
DEVICE void attend_block(const LatentAttentionArguments *args, State *state, const float *from, const u8 *stage, u32 first, const i32 *positions) {
    u32 lane = THREAD % WARP, q = lane % 4;
    const u16 *values = (const u16 *)stage + lane % 16 * ROW_STRIDE + lane / 16 * 8 + first_column();
    const float *scales = (const float *)(stage + KEYS * ROW_STRIDE * 2);
    float scores[8][4], scale = args->scale * 1.44269504f, factors[2];
    u32 probabilities[8][2];
    int tile, k, i;
    from += lane / 4 * SCORE_STRIDE + 2 * q;
    UNROLL for (tile = 0; tile < 8; tile++)
        UNROLL for (i = 0; i < 4; i++) {
            i32 position = (i32)(first + 8 * tile + 2 * q) + i % 2;
            float score = from[i / 2 * 8 * SCORE_STRIDE + 8 * tile + i % 2] * scale;
#if PAGES
            score *= scales[8 * tile + 2 * q + i % 2];
#endif
            scores[tile][i] = position > positions[i / 2] ? -INFINITE : score;
        }
    soften(scores, scales, state->largest, state->sum, factors, probabilities);
    UNROLL for (tile = 0; tile < 2 * RANK_TILES; tile++)
        UNROLL for (i = 0; i < 4; i++) state->out[tile][i] *= factors[i / 2];
    UNROLL for (k = 0; k < 4; k++) {
        u32 rows[4] = {probabilities[2 * k][0], probabilities[2 * k][1], probabilities[2 * k + 1][0], probabilities[2 * k + 1][1]};
        UNROLL for (tile = 0; tile < RANK_TILES; tile++) {
            u32 columns[4];
            load_transposed(columns, values + 16 * k * ROW_STRIDE + 16 * tile);
            mma(state->out[2 * tile], rows, columns);
            mma(state->out[2 * tile + 1], rows, columns + 2);
        }
    }
}

DEVICE void load_stage(const LatentAttentionArguments *args, u8 *stage, const u32 *table, u32 block, u32 until) {
    float *scales = (float *)(stage + KEYS * ROW_STRIDE * 2);
    load_block(&args->pages, stage, ROW_STRIDE, scales, table, 0, 0, args->pages.key_scales, block * KEYS, until, WIDTH / 8, BLOCK_THREADS);
    copy_commit();
}

// Blocks along x are tiles of rows over all sequences, along y parts.
KERNEL(latent_attention, LatentAttentionArguments, BLOCK_THREADS, 1) {
    SHARED(room);
    u32 lane = THREAD % WARP, row_tile = THREAD / (COLUMN_WARPS * WARP), block = 0, stage = 0, at, i;
    u8 *stages = room + QUERY_BYTES + SCORE_BYTES;
    const u16 *queries = (const u16 *)room + row_tile * 16 * ROW_STRIDE;
    float *scores = (float *)(room + QUERY_BYTES) + row_tile * 16 * SCORE_STRIDE;
    Tile tile = tile_at(&args, BLOCK_X);
    u32 end = (tile.until + KEYS - 1) / KEYS;
    const u32 *table = args.tables + tile.sequence[3];
    if (args.parts > 1) {
        block = BLOCK_Y * PART_BLOCKS;
        end = end < block + PART_BLOCKS ? end : block + PART_BLOCKS;
    }
    if (block >= end) return;
    for (at = THREAD; at < BLOCK_ROWS * (WIDTH / 8); at += BLOCK_THREADS) {
        u32 row = at / (WIDTH / 8), column = at % (WIDTH / 8) * 8;
        int is = tile.first + row < tile.rows && column < args.pages.dim;
        const u16 *from = args.q + ((u64)tile.sequence[0] * args.heads + tile.first + row) * args.pages.dim + column;
        copy_async(room + (row * ROW_STRIDE + column) * 2, is ? from : args.q, is);
    }
    i32 positions[2];
    for (i = 0; i < 2; i++) {
        u32 row = tile.first + row_tile * 16 + lane / 4 + 8 * i;
        positions[i] = row < tile.rows ? (i32)(tile.sequence[2] + row / args.heads) : -1;
    }
    State total, state;
    clear(&total);
    clear(&state);
    load_stage(&args, stages, table, block, tile.until);
    ROLLED for (; block < end; block++) {
        copy_wait(0);
        barrier();
        // Nobody reads the other stage any more.
        if (LATENT_STAGES > 1 && block + 1 < end) load_stage(&args, stages + (stage ^ 1) * STAGE_BYTES, table, block + 1, tile.until);
        score_keys(queries, (const u16 *)(stages + stage * STAGE_BYTES), scores);
        barrier();
        attend_block(&args, &state, scores, stages + stage * STAGE_BYTES, block * KEYS, positions);
        if (LATENT_STAGES > 1) stage ^= 1;
        else {
            barrier();
            if (block + 1 < end) load_stage(&args, stages, table, block + 1, tile.until);
        }
        if ((block + 1) % PART_BLOCKS == 0 && block + 1 < end) {
            end_part(&state);
            merge_part(&total, &state);
            clear(&state);
        }
    }
    end_part(&state);
    if (args.parts > 1) {
        float *to = args.states + ((u64)BLOCK_Y * GRID_X + BLOCK_X) * (STATE_FLOATS * BLOCK_THREADS) + THREAD;
        UNROLL for (i = 0; i < 2; i++) {
            to[i * BLOCK_THREADS] = state.largest[i];
            to[(2 + i) * BLOCK_THREADS] = state.sum[i];
        }
        UNROLL for (at = 0; at < 8 * RANK_TILES; at++) to[(4 + at) * BLOCK_THREADS] = state.out[at / 4][at % 4];
        return;
    }
    merge_part(&total, &state);
    write_out(&args, &tile, total.sum, total.out, first_column(), 2 * RANK_TILES);
}

// Merges parts that had blocks of their own. Blocks along x are tiles of rows as there, along y sixteen columns of each warp.
KERNEL(latent_attention_merge, LatentAttentionArguments, BLOCK_THREADS, 1) {
    Tile tile = tile_at(&args, BLOCK_X);
    u32 part, parts = (tile.until + KEYS * PART_BLOCKS - 1) / (KEYS * PART_BLOCKS);
    float largest[2] = {-INFINITE, -INFINITE}, sum[2] = {0.0f, 0.0f}, out[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
    int at, i;
    ROLLED for (part = 0; part < parts; part++) {
        const float *from = args.states + ((u64)part * GRID_X + BLOCK_X) * (STATE_FLOATS * BLOCK_THREADS) + THREAD;
        Shares share[2];
        UNROLL for (i = 0; i < 2; i++) {
            share[i] = shares(largest[i], from[i * BLOCK_THREADS]);
            largest[i] = share[i].largest;
            sum[i] = merged(sum[i], from[(2 + i) * BLOCK_THREADS], share[i]);
        }
        UNROLL for (at = 0; at < 8; at++)
            out[at / 4][at % 4] = merged(out[at / 4][at % 4], from[(4 + 8 * BLOCK_Y + at) * BLOCK_THREADS], share[at / 2 % 2]);
    }
    write_out(&args, &tile, sum, out, first_column() + 16 * BLOCK_Y, 2);
}
