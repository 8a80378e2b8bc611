// Attention over pages.
//
// Positions are cut at fixed places, whatever the step: into blocks of 64 keys and parts of 512. Within a part the softmax runs online over
// its blocks (arXiv 2205.14135), each part from nothing; parts are merged from first to last. All cuts are counted from position 0, and what
// a query does not see leaves its state as it is. So a query's bits depend on its position and its window alone: not on its
// neighbours, and not on whether one block of threads goes through all parts (`attention`, GRID_Z = 1) or each part has its own and
// `attention_merge` puts them together.
//
// A block of threads takes queries of one sequence that share a key/value head: row r is head r % group of token r / group. A warp has 16 of
// them. Scores and outputs are `mma.m16n8k16`: queries times keys, and, from registers, probabilities times values, whose fragments
// `ldmatrix` transposes. Keys and values of the next block are on their way while one is computed (ATT_STAGES = 2). Rows of keys are
// dim + 16 elements apart and rows of values dim + 8: eight rows fall into different banks.
//
// Bytes and products: a block of 64 keys of 128 elements is 32 KiB; for 64 queries it is 512 products of 2048 multiply-adds, 1024 cycles of
// an H100 at most, at 32 bytes a cycle from the second-level cache, where other heads' blocks find it too. With 16 rows (one token of
// a sequence) memory is what counts: two blocks of a warp on a processor have 72 KiB on their way, and 4.3 TB/s want 25.

enum {
    DIM = 16 * DIM_TILES,
    PART_BLOCKS = 8,
    ATT_ROWS = 16 * ATT_WARPS,
    KEY_STRIDE = DIM + 16,
    VALUE_STRIDE = DIM + 8,
    QUERY_BYTES = ATT_ROWS * KEY_STRIDE * 2,
    SCALE_BYTES = PAGES ? 2 * KEYS * 4 : 0,
    STAGE_BYTES = KEYS * (KEY_STRIDE + VALUE_STRIDE) * 2 + SCALE_BYTES,
    STATE_FLOATS = 8 * DIM_TILES + 4
};

typedef struct {
    FIELD(const float *, q);          // [rows][q_stride]
    FIELD(const u32 *, sequences);    // [sequences][4]: first row, rows, position of the first, start of its page table
    FIELD(const u32 *, tables);       // page ids
    FIELD(u16 *, to);                 // [rows][to_stride]
    FIELD(float *, states);           // [GRID_Z][sequences][kv_heads][STATE_FLOATS][32]; null where GRID_Z is 1
    FIELD(Pages, pages);
    FIELD(u32, sequence_count);
    FIELD(u32, group);                // query heads of a key/value head
    FIELD(u32, q_stride);
    FIELD(u32, to_stride);
    FIELD(u32, window);               // positions seen, itself included; 0 = all
    FIELD(u32, parts);                // parts that have blocks of their own; 1 = none
    FIELD(float, scale);              // of scores
    FIELD(float, cap);                // 0 = none
} AttentionArguments;

// Where a lane's numbers of a state stand, 32 lanes (or the threads of a block) side by side.
DEVICE void put_state(float *to, u32 stride, const State *state) {
    int at;
    UNROLL for (at = 0; at < 2; at++) {
        to[at * stride] = state->largest[at];
        to[(2 + at) * stride] = state->sum[at];
    }
    UNROLL for (at = 0; at < 8 * DIM_TILES; at++) to[(4 + at) * stride] = state->out[at / 4][at % 4];
}

// state = the total that stands at `from`, and the part `state` behind it.
DEVICE void merge_total(State *state, const float *from, u32 stride) {
    Shares share[2];
    int at, i;
    UNROLL for (i = 0; i < 2; i++) {
        share[i] = shares(from[i * stride], state->largest[i]);
        state->largest[i] = share[i].largest;
        state->sum[i] = merged(from[(2 + i) * stride], state->sum[i], share[i]);
    }
    UNROLL for (at = 0; at < 8 * DIM_TILES; at++) {
        float *own = &state->out[at / 4][at % 4];
        *own = merged(from[(4 + at) * stride], *own, share[at / 2 % 2]);
    }
}

// Writes outputs of 16 rows, from row `first` of the sequence on: `tiles` times eight columns, from `column` on.
DEVICE void write_out(const AttentionArguments *args, const u32 *sequence, u32 kv_head, u32 first, const float *sum, float (*out)[4],
                      u32 column, int tiles) {
    u32 lane = THREAD % WARP, group = args->group, dim = args->pages.dim;
    int i, at;
    column += lane % 4 * 2;
    UNROLL for (i = 0; i < 2; i++) {
        u32 row = first + lane / 4 + 8 * i;
        if (row >= sequence[1] * group) continue;
        float inverse = 1.0f / sum[i];
        u16 *to = args->to + (u64)(sequence[0] + row / group) * args->to_stride + (kv_head * group + row % group) * dim;
        UNROLL for (at = 0; at < tiles; at++)
            if (8 * at + column < dim) *(u32 *)(to + 8 * at + column) = narrow_pair(out[at][2 * i] * inverse, out[at][2 * i + 1] * inverse);
    }
}

// Blocks of keys that `rows` tokens from position `start` on see, first and end.
DEVICE u32 first_block(const AttentionArguments *args, u32 start) {
    return args->window && start + 1 > args->window ? (start + 1 - args->window) / KEYS : 0;
}

DEVICE void load_stage(const AttentionArguments *args, u8 *stage, const u32 *table, u32 kv_head, u32 block, u32 until) {
    float *scales = (float *)(stage + KEYS * (KEY_STRIDE + VALUE_STRIDE) * 2);
    const Pages *pages = &args->pages;
    load_block(pages, stage, KEY_STRIDE, scales, table, kv_head, 0, pages->key_scales, block * KEYS, until, 2 * DIM_TILES, ATT_WARPS * WARP);
    load_block(pages, stage + KEYS * KEY_STRIDE * 2, VALUE_STRIDE, scales + KEYS, table, kv_head, pages->values, pages->value_scales,
               block * KEYS, until, 2 * DIM_TILES, ATT_WARPS * WARP);
}

// Adds a block of keys to the state of a warp's 16 rows; `positions` are those of rows g and g + 8, -1 for a row that is none.
DEVICE void attend_block(const AttentionArguments *args, State *state, const u8 *queries, const u8 *stage, u32 first, const i32 *positions) {
    u32 lane = THREAD % WARP, g = lane / 4, q = lane % 4;
    const u16 *keys = (const u16 *)stage, *values = keys + KEYS * KEY_STRIDE;
    float scores[8][4], scale = args->cap == 0.0f ? args->scale * 1.44269504f : args->scale / args->cap, factors[2];
    const float *scales = (const float *)(stage + KEYS * (KEY_STRIDE + VALUE_STRIDE) * 2);
    u32 probabilities[8][2];
    int tile, k, i;
    UNROLL for (tile = 0; tile < 8; tile++)
        UNROLL for (i = 0; i < 4; i++) scores[tile][i] = 0.0f;
    UNROLL for (k = 0; k < DIM_TILES; k++) {
        // The instruction's k 2 q .. and 2 q + 8 .. are elements 4 q .. of sixteen: for queries and keys alike.
        const u32 *low = (const u32 *)((const u16 *)queries + g * KEY_STRIDE + 16 * k + 4 * q);
        const u32 *high = (const u32 *)((const u16 *)low + 8 * KEY_STRIDE);
        u32 rows[4] = {low[0], high[0], low[1], high[1]};
        UNROLL for (tile = 0; tile < 8; tile++) mma(scores[tile], rows, (const u32 *)(keys + (8 * tile + g) * KEY_STRIDE + 16 * k + 4 * q));
    }
    UNROLL for (tile = 0; tile < 8; tile++)
        UNROLL for (i = 0; i < 4; i++) {
            float *score = &scores[tile][i];
            i32 position = (i32)(first + 8 * tile + 2 * q) + i % 2, own = positions[i / 2];
            *score *= scale;
#if PAGES
            *score *= scales[8 * tile + 2 * q + i % 2];
#endif
            if (args->cap != 0.0f) *score = args->cap * 1.44269504f * tanhf(*score);
            if (position > own || (args->window && position + (i32)args->window <= own)) *score = -INFINITE;
        }
    soften(scores, scales + KEYS, state->largest, state->sum, factors, probabilities);
    UNROLL for (tile = 0; tile < 2 * DIM_TILES; tile++)
        UNROLL for (i = 0; i < 4; i++) state->out[tile][i] *= factors[i / 2];
    UNROLL for (k = 0; k < 4; k++) {
        u32 rows[4] = {probabilities[2 * k][0], probabilities[2 * k][1], probabilities[2 * k + 1][0], probabilities[2 * k + 1][1]};
        const u16 *row = values + (16 * k + lane % 16) * VALUE_STRIDE + lane / 16 * 8;
        UNROLL for (tile = 0; tile < DIM_TILES; tile++) {
            u32 columns[4];
            load_transposed(columns, row + 16 * tile);
            mma(state->out[2 * tile], rows, columns);
            mma(state->out[2 * tile + 1], rows, columns + 2);
        }
    }
}

// Blocks along x are tiles of rows, over all sequences where `parts` is 1, else one of each sequence; along y key/value heads, along z parts.
KERNEL(attention, AttentionArguments, ATT_WARPS * WARP, 1) {
    SHARED(room);
    u32 warp = THREAD / WARP, lane = THREAD % WARP, group = args.group, kv_head = BLOCK_Y, tile = BLOCK_X, index = 0, at, i;
    u8 *stages = room + QUERY_BYTES;
    float *totals = (float *)(stages + ATT_STAGES * STAGE_BYTES) + THREAD;
    u32 sequence[4] = {0, 0, 0, 0};
    if (args.parts > 1) {
        index = tile;
        tile = 0;
    }
    for (;; index++) {
        u32 tiles;
        if (index == args.sequence_count) return;
        for (i = 0; i < 4; i++) sequence[i] = args.sequences[4 * index + i];
        tiles = (sequence[1] * group + ATT_ROWS - 1) / ATT_ROWS;
        if (tile < tiles) {
            // Later tokens see more: the longest start first.
            tile = tiles - 1 - tile;
            break;
        }
        tile -= tiles;
    }
    u32 first_row = tile * ATT_ROWS, rows = sequence[1] * group;
    u32 last_row = (first_row + ATT_ROWS < rows ? first_row + ATT_ROWS : rows) - 1, until = sequence[2] + last_row / group + 1;
    u32 block = first_block(&args, sequence[2] + first_row / group), end = (until + KEYS - 1) / KEYS;
    const u32 *table = args.tables + sequence[3];
    if (args.parts > 1) {
        u32 first = BLOCK_Z * PART_BLOCKS;
        block = block > first ? block : first;
        end = end < first + PART_BLOCKS ? end : first + PART_BLOCKS;
        if (block >= end) return;
    }
    for (at = THREAD; at < ATT_ROWS * DIM / 2; at += ATT_WARPS * WARP) {
        u32 row = at / (DIM / 2), column = at % (DIM / 2) * 2, own = first_row + row;
        const float *from = args.q + (u64)(sequence[0] + own / group) * args.q_stride + (kv_head * group + own % group) * args.pages.dim + column;
        int is = own < rows && column < args.pages.dim;
        *(u32 *)(room + (row * KEY_STRIDE + column) * 2) = is ? narrow_pair(from[0], from[1]) : 0;
    }
    i32 positions[2];
    for (i = 0; i < 2; i++) {
        u32 row = first_row + warp * 16 + lane / 4 + 8 * i;
        positions[i] = row < rows ? (i32)(sequence[2] + row / group) : -1;
    }
    State state;
    int before = 0;
    u32 stage = 0;
    clear(&state);
    if (ATT_STAGES > 1) {
        load_stage(&args, stages, table, kv_head, block, until);
        copy_commit();
    }
    ROLLED for (; block < end; block++) {
        if (ATT_STAGES > 1) {
            if (block + 1 < end) load_stage(&args, stages + (stage ^ 1) * STAGE_BYTES, table, kv_head, block + 1, until);
            copy_commit();
            copy_wait(1);
        } else {
            load_stage(&args, stages, table, kv_head, block, until);
            copy_commit();
            copy_wait(0);
        }
        barrier();
        attend_block(&args, &state, room + warp * 16 * KEY_STRIDE * 2, stages + stage * STAGE_BYTES, block * KEYS, positions);
        barrier();
        if (ATT_STAGES > 1) stage ^= 1;
        if ((block + 1) % PART_BLOCKS == 0 && block + 1 < end) {
            end_part(&state);
            if (before) merge_total(&state, totals, ATT_WARPS * WARP);
            put_state(totals, ATT_WARPS * WARP, &state);
            clear(&state);
            before = 1;
        }
    }
    end_part(&state);
    if (before) merge_total(&state, totals, ATT_WARPS * WARP);
    if (args.parts > 1) {
        u64 own = ((u64)BLOCK_Z * args.sequence_count + index) * args.pages.kv_heads + kv_head;
        put_state(args.states + own * STATE_FLOATS * WARP + lane, WARP, &state);
        return;
    }
    write_out(&args, sequence, kv_head, first_row + warp * 16, state.sum, state.out, 0, 2 * DIM_TILES);
}

#if ATT_WARPS == 1
// Merges the parts of sequences with up to 16 rows. Blocks along x are sequences, along y key/value heads; a warp has 16 columns.
KERNEL(attention_merge, AttentionArguments, WARP * DIM_TILES, 1) {
    u32 index = BLOCK_X, kv_head = BLOCK_Y, lane = THREAD % WARP, warp = THREAD / WARP, sequence[4];
    int at, i;
    for (i = 0; i < 4; i++) sequence[i] = args.sequences[4 * index + i];
    u32 part = first_block(&args, sequence[2]) / PART_BLOCKS, end = (sequence[2] + sequence[1] - 1) / (KEYS * PART_BLOCKS) + 1;
    float largest[2] = {-INFINITE, -INFINITE}, sum[2] = {0.0f, 0.0f}, out[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
    ROLLED for (; part < end; part++) {
        u64 own = ((u64)part * args.sequence_count + index) * args.pages.kv_heads + kv_head;
        const float *from = args.states + own * STATE_FLOATS * WARP + lane;
        Shares share[2];
        UNROLL for (i = 0; i < 2; i++) {
            share[i] = shares(largest[i], from[i * WARP]);
            largest[i] = share[i].largest;
            sum[i] = merged(sum[i], from[(2 + i) * WARP], share[i]);
        }
        UNROLL for (at = 0; at < 8; at++)
            out[at / 4][at % 4] = merged(out[at / 4][at % 4], from[(4 + warp * 8 + at) * WARP], share[at / 2 % 2]);
    }
    write_out(&args, sequence, kv_head, 0, sum, out, warp * 16, 2);
}
#endif
