// Mixtures of experts: which experts each row goes to, which pairs of a row and an expert a block of `linear.cu` takes, and the sum over a row's
// experts. A pair has the number `row * chosen + choice`.
//
// What rows choose stays on the device. So grids are those of the most tiles that so many rows can make, and blocks without one leave at once.

enum { NONE = 0xffffffffu };

typedef struct {
    FIELD(const float *, logits);      // [rows][stride]
    FIELD(const float *, correction);  // [experts], or null: added to what experts are chosen by
    FIELD(u32 *, experts);             // [rows][chosen], best first; NONE in rows that are padding
    FIELD(float *, weights);           // [rows][chosen]
    FIELD(const u32 *, used);          // rows that are no padding
    FIELD(u32, stride);
    FIELD(u32, expert_count);
    FIELD(u32, chosen);
    FIELD(u32, sigmoid);               // scores are logistic functions of logits, else a softmax
    FIELD(u32, groups);                // of neighbouring experts; 0 = any may be chosen
    FIELD(u32, groups_kept);
    FIELD(u32, group_best);            // a group is worth its best one or two
    FIELD(u32, normalise);             // weights add to one
    FIELD(float, scale);
} ChooseArguments;

// Marks the highest of `count` ranks, the first of equals, and returns which it was, the same in each lane: 0 where none is a number. Lanes have every
// 32nd rank for themselves.
DEVICE u32 take_best(float *ranks, u32 count) {
    u32 best = NONE, at;
    float rank = -INFINITE;
    int mask;
    for (at = THREAD; at < count; at += WARP)
        if (ranks[at] > rank) {
            rank = ranks[at];
            best = at;
        }
    UNROLL for (mask = 16; mask; mask /= 2) {
        float other = shuffle_xor(rank, mask);
        u32 other_best = shuffle_xor_bits(best, mask);
        if (other > rank || (other == rank && other_best < best)) {
            rank = other;
            best = other_best;
        }
    }
    best = best == NONE ? 0 : best;
    if (best % WARP == THREAD) ranks[best] = -INFINITE;
    return best;
}

// Makes the experts outside the best groups impossible to choose.
DEVICE void keep_groups(const ChooseArguments *args, float *ranks, float *worths) {
    u32 size = args->expert_count / args->groups, at, group;
    for (group = THREAD; group < args->groups; group += WARP) {
        float first = -INFINITE, second = -INFINITE;
        for (at = group * size; at < (group + 1) * size; at++) {
            float rank = ranks[at];
            second = rank > first ? first : fmaxf(second, rank);
            first = fmaxf(first, rank);
        }
        worths[group] = args->group_best == 2 ? first + second : first;
    }
    for (at = 0; at < args->groups_kept; at++) take_best(worths, args->groups);
    warp_barrier();
    for (at = THREAD; at < args->expert_count; at += WARP)
        if (worths[at / size] != -INFINITE) ranks[at] = -INFINITE;
    warp_barrier();
}

// The experts of a row and their weights (engine/src/model/routing.rs). A block is a warp, and has a row.
KERNEL(choose, ChooseArguments, WARP, 1) {
    SHARED(room);
    const float *logits = args.logits + (u64)BLOCK_X * args.stride;
    float *scores = (float *)room, *ranks = scores + args.expert_count, *worths = ranks + args.expert_count;
    u32 first = BLOCK_X * args.chosen, at;
    float most = -INFINITE, sum = 0.0f;
    int mask;
    if (BLOCK_X >= *args.used) {
        for (at = THREAD; at < args.chosen; at += WARP) args.experts[first + at] = NONE;
        return;
    }
    if (!args.sigmoid) {
        for (at = THREAD; at < args.expert_count; at += WARP) most = fmaxf(most, logits[at]);
        UNROLL for (mask = 16; mask; mask /= 2) most = fmaxf(most, shuffle_xor(most, mask));
    }
    for (at = THREAD; at < args.expert_count; at += WARP) {
        scores[at] = args.sigmoid ? 1.0f / (1.0f + expf(-logits[at])) : expf(logits[at] - most);
        sum += scores[at];
    }
    sum = args.sigmoid ? 1.0f : warp_sum(sum);
    for (at = THREAD; at < args.expert_count; at += WARP) {
        scores[at] /= sum;
        ranks[at] = scores[at] + (args.correction ? args.correction[at] : 0.0f);
    }
    warp_barrier();
    if (args.groups) keep_groups(&args, ranks, worths);
    sum = 0.0f;
    for (at = 0; at < args.chosen; at++) {
        u32 expert = take_best(ranks, args.expert_count);
        sum += scores[expert];
        if (THREAD == 0) args.experts[first + at] = expert;
        // The lane that ends the weight begins it.
        if (THREAD == at % WARP) args.weights[first + at] = scores[expert];
    }
    for (at = THREAD; at < args.chosen; at += WARP) {
        float weight = args.weights[first + at];
        args.weights[first + at] = (args.normalise ? weight / (sum + 1e-20f) : weight) * args.scale;
    }
}

typedef struct {
    FIELD(const u32 *, experts);  // [pair_count]: of each pair, or NONE
    FIELD(u32 *, pairs);          // [pair_count]: those that have one, expert after expert, ascending
    FIELD(u32 *, tiles);          // [tile_count][3]: expert, first place in `pairs`, pairs; of no pairs where it is left over
    FIELD(u32, pair_count);
    FIELD(u32, expert_count);
    FIELD(u32, tile_rows);        // most pairs of a tile
    FIELD(u32, tile_count);       // the lesser of pair_count and pair_count / tile_rows + expert_count
} GroupArguments;

enum { GROUP_THREADS = 256, GROUP_WARPS = GROUP_THREADS / WARP };

// Number of the first tile of an expert that has `before` pairs of others before it. It leaves room for theirs, whatever they are: each pair has at most
// a tile; and each expert has at most one that is not full.
DEVICE u32 first_tile(const GroupArguments *args, u32 expert, u32 before) {
    return args->tile_count == args->pair_count ? before : before / args->tile_rows + expert;
}

DEVICE u32 warp_count(u32 count) {
    int mask;
    UNROLL for (mask = 16; mask; mask /= 2) count += shuffle_xor_bits(count, mask);
    return count;
}

// Lists an expert's pairs and its tiles. A block has an expert and needs no other: it counts what lies before it by itself. A thread goes through
// neighbouring pairs, twice.
KERNEL(group, GroupArguments, GROUP_THREADS, 1) {
    SHARED(room);
    u32 *own_counts = (u32 *)room, *warp_own = own_counts + GROUP_THREADS, *warp_before = warp_own + GROUP_WARPS;
    u32 expert = BLOCK_X, each = (args.pair_count + GROUP_THREADS - 1) / GROUP_THREADS, at;
    u32 start = THREAD * each, end = start + each < args.pair_count ? start + each : args.pair_count;
    u32 own = 0, before = 0, count = 0, place = 0, tile, next;
    for (at = start; at < end; at++) {
        own += args.experts[at] == expert;
        before += args.experts[at] < expert;
    }
    own_counts[THREAD] = own;
    own = warp_count(own);
    before = warp_count(before);
    if (THREAD % WARP == 0) {
        warp_own[THREAD / WARP] = own;
        warp_before[THREAD / WARP] = before;
    }
    barrier();
    before = 0;
    for (at = 0; at < GROUP_WARPS; at++) {
        before += warp_before[at];
        count += warp_own[at];
        place += at < THREAD / WARP ? warp_own[at] : 0;
    }
    for (at = THREAD / WARP * WARP; at < THREAD; at++) place += own_counts[at];
    tile = first_tile(&args, expert, before);
    next = expert + 1 < args.expert_count ? first_tile(&args, expert + 1, before + count) : args.tile_count;
    for (at = THREAD; at < next - tile; at += GROUP_THREADS) {
        u32 *to = args.tiles + 3 * (u64)(tile + at), first = at * args.tile_rows, left = first < count ? count - first : 0;
        to[0] = expert;
        to[1] = before + first;
        to[2] = left < args.tile_rows ? left : args.tile_rows;
    }
    if (count == 0) return;
    for (at = start, place += before; at < end; at++)
        if (args.experts[at] == expert) args.pairs[place++] = at;
}

typedef struct {
    FIELD(const float *, outcomes);  // [rows][chosen][stride]
    FIELD(const float *, weights);   // [rows][chosen]
    FIELD(float *, to);              // [rows][stride]
    FIELD(const u32 *, used);        // rows that are no padding
    FIELD(u32, chosen);
    FIELD(u32, stride);
} MixArguments;

enum { MIX_THREADS = 256 };

// Adds to a row what its experts made of it, weighted, in the order of its choices. A block has a row.
KERNEL(mix, MixArguments, MIX_THREADS, 4) {
    const float *outcomes = args.outcomes + (u64)BLOCK_X * args.chosen * args.stride, *weights = args.weights + BLOCK_X * args.chosen;
    float *to = args.to + (u64)BLOCK_X * args.stride;
    u32 at, choice;
    if (BLOCK_X >= *args.used) return;
    for (at = THREAD; at < args.stride; at += MIX_THREADS) {
        float sum = 0.0f;
        for (choice = 0; choice < args.chosen; choice++) sum = fmaf(weights[choice], outcomes[(u64)choice * args.stride + at], sum);
        to[at] += sum;
    }
}
