// Kernels that take a row at a time: embeddings, norms, rows that are kept. A block is a row.
//
// They move few bytes beside the linears (a row of 4096 is 16 KiB); a decode step waits for their latency, so a block has as many
// threads as leave each a few loads of 16 bytes, and nothing is read from memory twice: a row stays in the first-level cache.
// A row's sum has one order: each thread adds every 256th group of four, lanes are added in a tree, warps one after the other.

enum { ROW_THREADS = 256 };

typedef struct {
    FIELD(const u32 *, tokens);  // [rows]: a token, or with its highest bit a row of found
    FIELD(const u32 *, found);   // what is no token counts as the first
    FIELD(const void *, table);
    FIELD(float *, to);          // [rows][stride]
    FIELD(u32, vocab);
    FIELD(u32, width);
    FIELD(u32, stride);
    FIELD(float, scale);
} EmbedArguments;

// The token of a block's row.
DEVICE u32 token_of(const EmbedArguments *args) {
    u32 token = args->tokens[BLOCK_X];
    if (token >> 31) {
        token = args->found[token & 0x7fffffff];
        if (token >= args->vocab) token = 0;
    }
    return token;
}

typedef struct {
    FIELD(EmbedArguments, all);
    FIELD(u32, kind);            // of the table: 0 rows of 16-bit floats, 1 rows of f32, 2 packed panels of 16-bit floats
} EmbedFloatsArguments;

// residual = scale * embedding, zero beyond the width.
KERNEL(embed, EmbedFloatsArguments, ROW_THREADS, 4) {
    u32 token = token_of(&args.all), width = args.all.width, steps = (width + 31) / 32, at;
    const void *table = args.all.table;
    float *to = args.all.to + (u64)BLOCK_X * args.all.stride;
    for (at = THREAD; at < args.all.stride; at += ROW_THREADS) {
        float value = 0.0f;
        if (at < width) {
            u64 index = (u64)token * width + at;
            if (args.kind == 1) value = ((const float *)table)[index];
            else if (args.kind == 0) value = wide(((const u16 *)table)[index]);
            else value = wide(((const u16 *)table)[panel_pair(token, at / 2, steps) * 2 + at % 2]);
        }
        to[at] = value * args.all.scale;
    }
}

typedef struct {
    FIELD(EmbedArguments, all);  // of panels as in codes.cu
    FIELD(u64, panel_bytes);
    FIELD(u32, group_bytes);
    FIELD(u32, group_inputs);
    FIELD(u32, narrow);          // scales are f16
    FIELD(u32, offsets);         // there are some
    FIELD(u32, code);            // 0 integers of four bits, 1 of eight, 2 e4m3
} EmbedCodesArguments;

// Weight `at` of an output of a panel, to the bit what the CPU home makes of it.
DEVICE float widened(const EmbedCodesArguments *args, const u8 *panel, u32 column, u32 at) {
    const u8 *group = panel + (u64)(at / args->group_inputs) * args->group_bytes, *offsets = group + PANEL * (args->narrow ? 2 : 4);
    u32 per_word = args->code ? 4 : 8, place = at % args->group_inputs, index = place % per_word;
    u32 word = ((const u32 *)(offsets + (args->offsets ? PANEL * 4 : 0)))[place / per_word * PANEL + column];
    u32 code = args->code ? word >> 8 * index & 255 : word >> (index % 2 * 4 + index / 2 % 2 * 16 + index / 4 * 8) & 15;
    float scale = args->narrow ? f16_float(((const u16 *)group)[column]) : ((const float *)group)[column], value = (float)code;
    // The exponent of an e4m3 is too small by 120.
    if (args->code == 2) value = bits_float((code & 0x7f) << 20 | (code & 0x80) << 24) * bits_float((127 + 120) << 23);
    float middle = args->code == 0 ? 8.0f : args->code == 1 ? 128.0f : 0.0f;
    return fmaf(value, scale, args->offsets ? ((const float *)offsets)[column] : -middle * scale);
}

// As `embed`, of codes.
KERNEL(embed_codes, EmbedCodesArguments, ROW_THREADS, 4) {
    u32 token = token_of(&args.all), at;
    const u8 *panel = (const u8 *)args.all.table + (u64)(token / PANEL) * args.panel_bytes;
    float *to = args.all.to + (u64)BLOCK_X * args.all.stride;
    for (at = THREAD; at < args.all.stride; at += ROW_THREADS)
        to[at] = at < args.all.width ? widened(&args, panel, token % PANEL, at) * args.all.scale : 0.0f;
}

typedef struct {
    FIELD(const float *, from);   // [rows][from_stride]
    FIELD(const float *, weight); // [width]
    FIELD(const float *, bias);   // [width], or null
    FIELD(void *, to);            // [rows][to_stride]
    FIELD(u32, width);
    FIELD(u32, from_stride);
    FIELD(u32, to_stride);
    FIELD(u32, kind);             // 0 as it is, 1 over the root mean square, 2 without its mean
    FIELD(float, eps);
} NormArguments;

typedef struct { float mean, scale; } Moments;

DEVICE Moments row_moments(const float *from, u32 width, u32 kind, float eps, float *room) {
    Moments moments = {0.0f, 1.0f};
    float sum = 0.0f;
    u32 at;
    if (kind == 0) return moments;
    if (kind == 2) {
        for (at = THREAD; at < width; at += ROW_THREADS) sum += from[at];
        moments.mean = block_sum(sum, room) / (float)width;
        sum = 0.0f;
    }
    for (at = THREAD; at < width; at += ROW_THREADS) {
        float value = from[at] - moments.mean;
        sum = fmaf(value, value, sum);
    }
    moments.scale = 1.0f / sqrtf(block_sum(sum, room) / (float)width + eps);
    return moments;
}

DEVICE float normed(const NormArguments *args, const float *from, Moments moments, u32 at) {
    float value = from[at];
    if (args->kind == 0) return value;
    value = (value - moments.mean) * moments.scale * args->weight[at];
    return args->bias ? value + args->bias[at] : value;
}

// Writes rows as 16-bit floats, zero beyond the width.
KERNEL(norm_store, NormArguments, ROW_THREADS, 4) {
    SHARED(room);
    const float *from = args.from + (u64)BLOCK_X * args.from_stride;
    u32 *to = (u32 *)((u16 *)args.to + (u64)BLOCK_X * args.to_stride);
    Moments moments = row_moments(from, args.width, args.kind, args.eps, (float *)room);
    u32 at;
    for (at = 2 * THREAD; at < args.to_stride; at += 2 * ROW_THREADS) {
        float low = at < args.width ? normed(&args, from, moments, at) : 0.0f;
        float high = at + 1 < args.width ? normed(&args, from, moments, at + 1) : 0.0f;
        to[at / 2] = narrow_pair(low, high);
    }
}

// Adds rows to f32.
KERNEL(norm_add, NormArguments, ROW_THREADS, 4) {
    SHARED(room);
    const float *from = args.from + (u64)BLOCK_X * args.from_stride;
    float *to = (float *)args.to + (u64)BLOCK_X * args.to_stride;
    Moments moments = row_moments(from, args.width, args.kind, args.eps, (float *)room);
    u32 at;
    for (at = THREAD; at < args.width; at += ROW_THREADS) to[at] += normed(&args, from, moments, at);
}

typedef struct {
    FIELD(const u32 *, from);  // [rows][stride] f32
    FIELD(u32 *, stages);      // [rows]
    FIELD(u32, width);
    FIELD(u32, stride);
    FIELD(u32, stage);         // above 0
    FIELD(u32, first);         // whether nothing was said of these rows before
} CheckArguments;

// Notes the stage at which a row first has an infinity or a NaN; 0 where it has none.
KERNEL(check, CheckArguments, ROW_THREADS, 4) {
    SHARED(room);
    const u32 *from = args.from + (u64)BLOCK_X * args.stride;
    u32 *stage = args.stages + BLOCK_X, at;
    float found = 0.0f;
    for (at = THREAD; at < args.width; at += ROW_THREADS) {
        if ((from[at] & 0x7f800000) == 0x7f800000) found = 1.0f;
    }
    found = block_sum(found, (float *)room);
    if (THREAD == 0 && (args.first || *stage == 0)) *stage = found > 0.0f ? args.stage : 0;
}

typedef struct {
    FIELD(const u32 *, from);  // [any][stride]
    FIELD(const u32 *, rows);  // [kept]
    FIELD(u32 *, to);          // [kept][stride], elsewhere
    FIELD(u32, stride);        // words of 32 bits from row to row
} GatherArguments;

// Copies the rows that are kept.
KERNEL(gather, GatherArguments, ROW_THREADS, 4) {
    const u32 *from = args.from + (u64)args.rows[BLOCK_X] * args.stride;
    u32 *to = args.to + (u64)BLOCK_X * args.stride, at;
    for (at = THREAD; at < args.stride; at += ROW_THREADS) to[at] = from[at];
}

typedef struct {
    FIELD(const void *, parts);  // [parts][rows][part_stride]
    FIELD(void *, to);           // [rows][to_stride]
    FIELD(u32, part_stride);
    FIELD(u32, part_width);
    FIELD(u32, width);           // of all parts
    FIELD(u32, to_stride);
} JoinArguments;

// How many columns of its part are there: the last parts may have fewer than others, or none.
DEVICE u32 join_end(const JoinArguments *args) {
    u32 first = BLOCK_Y * args->part_width;
    return first >= args->width ? 0 : args->width - first < args->part_width ? args->width - first : args->part_width;
}

// Puts parts of rows side by side, 16-bit floats, zero beyond the width.
KERNEL(join_halves, JoinArguments, ROW_THREADS, 4) {
    const u16 *from = (const u16 *)args.parts + ((u64)BLOCK_Y * GRID_X + BLOCK_X) * args.part_stride;
    u16 *row = (u16 *)args.to + (u64)BLOCK_X * args.to_stride, *to = row + BLOCK_Y * args.part_width;
    u32 at, end = join_end(&args);
    for (at = THREAD; at < end; at += ROW_THREADS) to[at] = from[at];
    if (BLOCK_Y + 1 == GRID_Y)
        for (at = args.width + THREAD; at < args.to_stride; at += ROW_THREADS) row[at] = 0;
}

// The same of f32. What lies beyond the width stays.
KERNEL(join_floats, JoinArguments, ROW_THREADS, 4) {
    const float *from = (const float *)args.parts + ((u64)BLOCK_Y * GRID_X + BLOCK_X) * args.part_stride;
    float *to = (float *)args.to + (u64)BLOCK_X * args.to_stride + BLOCK_Y * args.part_width;
    u32 at, end = join_end(&args);
    for (at = THREAD; at < end; at += ROW_THREADS) to[at] = from[at];
}

// Adds parts of rows to f32.
KERNEL(join_add, JoinArguments, ROW_THREADS, 4) {
    const float *from = (const float *)args.parts + ((u64)BLOCK_Y * GRID_X + BLOCK_X) * args.part_stride;
    float *to = (float *)args.to + (u64)BLOCK_X * args.to_stride + BLOCK_Y * args.part_width;
    u32 at, end = join_end(&args);
    for (at = THREAD; at < end; at += ROW_THREADS) to[at] += from[at];
}

typedef struct {
    FIELD(const u16 *, from);   // [rows][stride]
    FIELD(const u32 *, order);  // [width]
    FIELD(u16 *, to);           // [rows][stride], elsewhere
    FIELD(u32, width);
    FIELD(u32, stride);         // even
} ReorderArguments;

// to[i] = from[order[i]] in each row, zero beyond the width.
KERNEL(reorder, ReorderArguments, ROW_THREADS, 4) {
    const u16 *from = args.from + (u64)BLOCK_X * args.stride;
    u32 *to = (u32 *)(args.to + (u64)BLOCK_X * args.stride), at;
    for (at = 2 * THREAD; at < args.stride; at += 2 * ROW_THREADS) {
        u32 low = at < args.width ? from[args.order[at]] : 0, high = at + 1 < args.width ? from[args.order[at + 1]] : 0;
        to[at / 2] = low | high << 16;
    }
}

typedef struct {
    FIELD(float *, logits);  // [rows][stride]
    FIELD(u32, stride);
    FIELD(u32, columns);
    FIELD(float, scale);
    FIELD(float, cap);       // 0 = none
} CapArguments;

// logit = cap * tanh(scale * logit / cap), or scale * logit. Blocks along y share a row.
KERNEL(cap, CapArguments, ROW_THREADS, 4) {
    float *row = args.logits + (u64)BLOCK_X * args.stride;
    u32 at;
    for (at = BLOCK_Y * ROW_THREADS + THREAD; at < args.columns; at += GRID_Y * ROW_THREADS) {
        float logit = row[at] * args.scale;
        row[at] = args.cap == 0.0f ? logit : args.cap * tanhf(logit / args.cap);
    }
}

typedef struct {
    FIELD(const float *, logits);  // [rows][stride]
    FIELD(u32 *, to);              // [rows]
    FIELD(u32, stride);
    FIELD(u32, columns);
} LargestArguments;

enum { LARGEST_THREADS = 1024 };

// The column of the largest logit, the lowest of equals; what is no number or minus infinity is passed over, and a row of nothing
// else gives 2^32 - 1.
KERNEL(largest, LargestArguments, LARGEST_THREADS, 1) {
    SHARED(room);
    const float *row = args.logits + (u64)BLOCK_X * args.stride;
    float best = -INFINITE;
    u32 column = 0xffffffffu, at;
    int mask;
    float *bests = (float *)room;
    u32 *columns = (u32 *)room + LARGEST_THREADS / WARP;
    for (at = THREAD; at < args.columns; at += LARGEST_THREADS) {
        float logit = row[at];
        if (logit > best) {
            best = logit;
            column = at;
        }
    }
    for (mask = 16; mask; mask /= 2) {
        float other = shuffle_xor(best, mask);
        u32 other_column = shuffle_xor_bits(column, mask);
        if (other > best || (other == best && other_column < column)) {
            best = other;
            column = other_column;
        }
    }
    if (THREAD % WARP == 0) {
        bests[THREAD / WARP] = best;
        columns[THREAD / WARP] = column;
    }
    barrier();
    if (THREAD == 0) {
        for (at = 1; at < LARGEST_THREADS / WARP; at++)
            if (bests[at] > best || (bests[at] == best && columns[at] < column)) {
                best = bests[at];
                column = columns[at];
            }
        args.to[BLOCK_X] = column;
    }
}
