// Linears: rows of 16-bit inputs times packed weights of the same type, sums in f32.
//
// Weights lie as the CPU home packs them: panels of 64 outputs, `[inputs / 2][64]` pairs of neighbouring inputs, inputs up to a whole
// *step* of 32. A step of half a panel is what a warp multiplies at once: with g = lane / 4 and q = lane % 4 a lane reads outputs 4 g ..
// 4 g + 3 of pairs 4 q .. 4 q + 3, four loads of 16 bytes, and inputs 8 q .. 8 q + 7 of rows g and g + 8, two more. These are the
// operands of `mma.m16n8k16` for two runs of 16 inputs and four of eight outputs, once one agrees that the instruction's k 2 q, 2 q + 1
// are the lane's first pair and 2 q + 8, 2 q + 9 its second, and that its column g of product j is output 4 g + j. Nothing is moved between
// lanes, and a lane ends with eight neighbouring outputs (8 q ..) of rows g and g + 8.
//
// **One order.** The inputs are cut into `splits` runs of whole steps, a function of the weights' shape. Within a run the products
// follow each other in one chain of `mma`; runs are added from first to last. Every kernel here keeps to it, so an output's bits do
// not depend on how many rows there are, or on which kernel computes them.
//
// `linear_stream` is for up to 32 rows: weights go from memory to registers, each byte once. A warp keeps STREAM_STAGES steps of 2 KiB on
// their way: three of them in 8 warps on each of 132 processors are 6.5 MB, and 4.3 TB/s at 800 ns want 3.4 MB. The other warps of a block take other
// runs of the same outputs, or other outputs, and sums meet in shared memory.
//
// `linear_tiled` is for more: both operands pass through shared memory, STAGES steps ahead. A warp multiplies MT * 16 rows with a panel:
// for MT = 4 it reads 8 KiB of shared memory for 64 products of 2048 multiply-adds. A block of 8 such warps (128 rows, 256 outputs) asks
// 64 KiB of a step, 512 cycles at 128 bytes a cycle, and multiplies for 512 cycles at most (2048 a cycle; `mma.sync` reaches about 62 % of
// that on sm_90), and from the second-level cache 24 KiB, 29 bytes a cycle at that rate. Runs follow each other in one block and their sums wait in shared
// memory, or, where that would leave processors idle, lie in blocks of their own, of which the last to end adds all.
//
// **Experts.** Where `GROUPED` is 1 rows are pairs of a row and one of the experts that it chose, `row * chosen + choice`, and weights those of all
// experts, one after the other. A block takes a *tile* of pairs of one expert, which `experts.cu` lists, and finds inputs and outputs through their
// numbers: nothing is copied side by side, and an expert's weights are read once for a tile. All else is as above, so a pair's bits do not
// depend on who shares its expert. The heads of latent attention are as experts that every row goes to.

enum { STORE, ADD, GATE, ACTIVATE, NARROW };
enum { SILU, GELU, GELU_TANH };

typedef struct {
    FIELD(const u32 *, weights);  // [panels][16 steps][64] pairs
    FIELD(const float *, bias);   // [panels * 64], or null
    FIELD(const u16 *, input);    // [rows][input_stride], numbers up to a whole step
    FIELD(void *, to);            // [rows][to_stride]: f32 for STORE and ADD, else 16-bit floats
    FIELD(float *, partial);      // where runs have blocks of their own: [splits][tiles][...]
    FIELD(u32 *, counters);       // [tiles], zero before and after
    FIELD(u32, rows);
    FIELD(u32, panels);
    FIELD(u32, steps);
    FIELD(u32, splits);
    FIELD(u32, input_stride);     // elements
    FIELD(u32, to_stride);        // elements
    FIELD(u32, what);             // STORE ..
    FIELD(u32, activation);       // SILU ..
#if GROUPED
    FIELD(const u32 *, pairs);    // [rows], expert after expert
    FIELD(const u32 *, tiles);    // [tiles][3]: an expert, where its pairs begin, how many there are; none in those that are left over
    FIELD(u64, expert_bytes);     // of weights
    FIELD(u32, sharers);          // pairs that follow each other and have the same inputs
    FIELD(u32, width);            // outputs of a pair that are written, a multiple of 8
#else
    FIELD(const Adapted *, adapted);  // or null: no row has a delta
    FIELD(u32, place);            // which of a layer's deltas
    FIELD(u32, first_column);     // outputs of the delta before those at hand
#endif
} LinearArguments;

DEVICE float activate(float x, u32 activation) {
    if (activation == SILU) return x / (1.0f + expf(-x));
    if (activation == GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
}

// Adds the biases of eight neighbouring outputs of a row, and what its adapter makes of them.
DEVICE void complete(const LinearArguments *args, u32 row, u32 column, float *sums) {
    int at;
    if (args->bias) UNROLL for (at = 0; at < 8; at++) sums[at] += args->bias[column + at];
#if GROUPED
    (void)row;
#else
    if (args->adapted) add_delta(args->adapted, args->place, row, args->first_column + column, sums);
#endif
}

// Writes eight neighbouring 16-bit floats.
DEVICE void write_narrow(u16 *to, const float *values) {
    quad q;
    int at;
    UNROLL for (at = 0; at < 4; at++) q.word[at] = narrow_pair(values[2 * at], values[2 * at + 1]);
    *(quad *)to = q;
}

// Ends eight neighbouring outputs of a row, from `column` on.
DEVICE void finish(const LinearArguments *args, u32 row, u32 column, float *sums) {
    u64 at = (u64)row * args->to_stride + column;
    int i;
#if GROUPED
    if (column >= args->width) return;
#endif
    complete(args, row, column, sums);
    if (args->what == ACTIVATE || args->what == NARROW) {
        if (args->what == ACTIVATE) UNROLL for (i = 0; i < 8; i++) sums[i] = activate(sums[i], args->activation);
        write_narrow((u16 *)args->to + at, sums);
        return;
    }
    float *to = (float *)args->to + at;
    if (args->what == ADD) UNROLL for (i = 0; i < 8; i++) sums[i] += to[i];
    UNROLL for (i = 0; i < 8; i++) to[i] = sums[i];
}

// Ends eight neighbouring gates of a row and what they let through, from `column` of panel `panel` on.
DEVICE void finish_gated(const LinearArguments *args, u32 row, u32 panel, u32 column, float *gates, float *ups) {
    int i;
    complete(args, row, panel * PANEL + column, gates);
    complete(args, row, panel * PANEL + 32 + column, ups);
    UNROLL for (i = 0; i < 8; i++) gates[i] = activate(gates[i], args->activation) * ups[i];
    write_narrow((u16 *)args->to + (u64)row * args->to_stride + panel * 32 + column, gates);
}

// What a block multiplies: rows from `first` on with `weights`. Grouped, rows are places in the list of pairs.
typedef struct { u32 first, rows; const u32 *weights; } Tile;

// The tile of number `index`: of up to `most` rows.
DEVICE Tile tile_at(const LinearArguments *args, u32 index, u32 most) {
#if GROUPED
    const u32 *listed = args->tiles + 3 * (u64)index;
    Tile tile = {listed[1], listed[2], args->weights + listed[0] * (args->expert_bytes / 4)};
    (void)most;
#else
    u32 first = index * most, left = args->rows - first;
    Tile tile = {first, left < most ? left : most, args->weights};
#endif
    return tile;
}

DEVICE u32 input_row(const LinearArguments *args, u32 row) {
#if GROUPED
    return args->pairs[row] / args->sharers;
#else
    (void)args;
    return row;
#endif
}

DEVICE u32 output_row(const LinearArguments *args, u32 row) {
#if GROUPED
    return args->pairs[row];
#else
    (void)args;
    return row;
#endif
}

// First step of a run.
DEVICE u32 run_start(const LinearArguments *args, u32 run) { return (u32)((u64)args->steps * run / args->splits); }

// Multiplies half `k` of a step: `a` holds inputs of rows g and g + 8, `b` the pairs of half a panel; sums[4 * j ..] are product j.
DEVICE void multiply_half(float *sums, const quad *a, const quad *b, int k) {
    u32 rows[4] = {a[0].word[2 * k], a[1].word[2 * k], a[0].word[2 * k + 1], a[1].word[2 * k + 1]};
    int j;
    UNROLL for (j = 0; j < 4; j++) {
        u32 columns[2] = {b[2 * k].word[j], b[2 * k + 1].word[j]};
        mma(sums + 4 * j, rows, columns);
    }
}

DEVICE void multiply_step(float *sums, const quad *a, const quad *b) {
    multiply_half(sums, a, b, 0);
    multiply_half(sums, a, b, 1);
}

#ifdef STREAM_TILES
// Two blocks on a processor where registers allow.
enum { STREAM_WARPS = 8, STREAM_ROWS = 16 * STREAM_TILES, STREAM_BLOCKS = STREAM_TILES == 1 ? 2 : 1 };

// Where a lane's inputs begin: of rows g + 8 * at of a tile, null where there is no such row.
typedef struct { const u16 *from[2 * STREAM_TILES]; } LaneInputs;

DEVICE LaneInputs lane_inputs(const LinearArguments *args, const Tile *tile) {
    u32 row = THREAD % WARP / 4, q = THREAD % WARP % 4;
    LaneInputs inputs;
    int at;
    UNROLL for (at = 0; at < 2 * STREAM_TILES; at++, row += 8)
        inputs.from[at] = row < tile->rows ? args->input + (u64)input_row(args, tile->first + row) * args->input_stride + 8 * q : 0;
    return inputs;
}

DEVICE quad load_inputs(const LaneInputs *inputs, int at, u32 step) {
    quad none = {{0, 0, 0, 0}};
    return inputs->from[at] ? *(const quad *)(inputs->from[at] + step * 32) : none;
}

// Leaves a warp's sums where `join_runs` finds them: `[warps][rows][32]`.
DEVICE void leave_sums(u8 *room, float (*sums)[16]) {
    u32 lane = THREAD % WARP, g = lane / 4, q = lane % 4;
    float *partial = (float *)room + THREAD / WARP * (STREAM_ROWS * 32);
    int tile, at, e, j;
    UNROLL for (tile = 0; tile < STREAM_TILES; tile++)
        UNROLL for (at = 0; at < 2; at++)
            UNROLL for (e = 0; e < 2; e++)
                UNROLL for (j = 0; j < 4; j++)
                    partial[(tile * 16 + at * 8 + g) * 32 + 8 * q + 4 * e + j] = sums[tile][4 * j + 2 * at + e];
}

// Adds runs from first to last and ends the outputs of `halves` halves of panels, from `first_half` on, for a tile. A thread takes eight outputs of
// a row, or as many gates.
DEVICE void join_runs(const LinearArguments *args, const u8 *room, u32 first_half, u32 halves, const Tile *tile) {
    u32 gated = args->what == GATE, rows = tile->rows, units = (gated ? halves / 2 : halves) * rows * 4, unit;
    int at, e;
    barrier();
    ROLLED for (unit = THREAD; unit < units; unit += STREAM_WARPS * WARP) {
        u32 column = unit % 4 * 8, row = unit / 4 % rows, own = unit / 4 / rows * (gated ? 2 : 1), half = first_half + own, split;
        const float *first = (const float *)room + (u64)own * args->splits * (STREAM_ROWS * 32) + row * 32 + column;
        float totals[2][8];
        if (half >= 2 * args->panels) break;
        UNROLL for (e = 0; e < 2; e++) {
            if (e == 1 && !gated) break;
            UNROLL for (at = 0; at < 8; at++) totals[e][at] = first[at];
            for (split = 1; split < args->splits; split++)
                UNROLL for (at = 0; at < 8; at++) totals[e][at] += first[split * (STREAM_ROWS * 32) + at];
            first += args->splits * (STREAM_ROWS * 32);
        }
        row = output_row(args, tile->first + row);
        if (gated) finish_gated(args, row, half / 2, column, totals[0], totals[1]);
        else finish(args, row, half * 32 + column, totals[0]);
    }
}

#ifndef CODE
typedef struct { quad a[2 * STREAM_TILES], b[4]; } StreamStage;

DEVICE void stream_load(StreamStage *stage, const u32 *weights, const LaneInputs *inputs, u32 step, u32 end) {
    int at;
    if (step >= end) return;
    UNROLL for (at = 0; at < 4; at++) stage->b[at] = load_once(weights + ((u64)step * 16 + at) * PANEL);
    UNROLL for (at = 0; at < 2 * STREAM_TILES; at++) stage->a[at] = load_inputs(inputs, at, step);
}

// Blocks along y take 16 * STREAM_TILES rows each, along x 8 / splits halves of panels.
KERNEL(linear_stream, LinearArguments, STREAM_WARPS * WARP, STREAM_BLOCKS) {
    SHARED(room);
    u32 lane = THREAD % WARP, warp = THREAD / WARP, g = lane / 4, q = lane % 4;
    u32 halves = STREAM_WARPS / args.splits, run = warp % args.splits;
    u32 half = BLOCK_X * halves + warp / args.splits;
    Tile rows = tile_at(&args, BLOCK_Y, STREAM_ROWS);
    float sums[STREAM_TILES][16];
    int at, tile, stage;
    if (GROUPED && rows.rows == 0) return;
    UNROLL for (tile = 0; tile < STREAM_TILES; tile++)
        UNROLL for (at = 0; at < 16; at++) sums[tile][at] = 0.0f;
    if (half < 2 * args.panels) {
        const u32 *weights = rows.weights + ((u64)(half / 2) * args.steps * 16 + 4 * q) * PANEL + half % 2 * 32 + 4 * g;
        LaneInputs inputs = lane_inputs(&args, &rows);
        u32 step = run_start(&args, run), end = run_start(&args, run + 1);
        StreamStage stages[STREAM_STAGES];
        UNROLL for (stage = 0; stage < STREAM_STAGES; stage++) stream_load(&stages[stage], weights, &inputs, step + stage, end);
        for (; step < end; step += STREAM_STAGES) {
            UNROLL for (stage = 0; stage < STREAM_STAGES; stage++) {
                if (step + stage < end) {
                    UNROLL for (tile = 0; tile < STREAM_TILES; tile++)
                        multiply_step(sums[tile], stages[stage].a + 2 * tile, stages[stage].b);
                    stream_load(&stages[stage], weights, &inputs, step + STREAM_STAGES + stage, end);
                }
            }
        }
    }
    leave_sums(room, sums);
    join_runs(&args, room, BLOCK_X * halves, halves, &rows);
}

#if STREAM_TILES == 1 && !GROUPED
typedef struct {
    FIELD(LinearArguments, linear);  // whose weights are to be laid out
    FIELD(u32 *, to);                // [panels * 64][16 steps] pairs
} LayFloatsArguments;

// Lays weights out output after output, as libraries have them. A warp takes a step of half a panel as it does above, and turns squares of four
// words in registers: it reads 128 bytes in a row and writes 64, and its neighbour those behind.
KERNEL(lay_floats, LayFloatsArguments, STREAM_WARPS * WARP, 4) {
    u32 lane = THREAD % WARP, g = lane / 4, q = lane % 4, steps = args.linear.steps;
    u32 index = BLOCK_X * STREAM_WARPS + THREAD / WARP, half = index / steps, step = index % steps;
    quad b[4];
    int at, j;
    if (half >= 2 * args.linear.panels) return;
    const u32 *from = args.linear.weights + ((u64)(half / 2 * steps + step) * 16 + 4 * q) * PANEL + half % 2 * 32 + 4 * g;
    u32 *to = args.to + ((u64)(half * 32 + 4 * g) * steps + step) * 16 + 4 * q;
    UNROLL for (at = 0; at < 4; at++) b[at] = load_once(from + at * PANEL);
    UNROLL for (j = 0; j < 4; j++) {
        quad pairs = {{b[0].word[j], b[1].word[j], b[2].word[j], b[3].word[j]}};
        *(quad *)(to + (u64)j * steps * 16) = pairs;
    }
}
#endif
#endif
#endif

#ifdef TILE_MT
// A block takes TILE_ROW_WARPS * TILE_MT * 16 rows and TILE_PANELS panels; a warp TILE_MT * 16 rows and one panel.
enum {
    TILE_WARPS = TILE_ROW_WARPS * TILE_PANELS,
    TILE_ROWS = TILE_ROW_WARPS * TILE_MT * 16,
    TILE_INPUT_BYTES = TILE_ROWS * 64,
    // Sixteen bytes of inputs that a thread copies in a step.
    TILE_COPIES = TILE_ROWS * 4 / (TILE_WARPS * WARP),
    TILE_STAGE_BYTES = TILE_INPUT_BYTES + TILE_PANELS * 4096,
    // Sixteen rows of a panel, f32, with a quad between rows so that they fall into different banks.
    TILE_FINISH_STRIDE = PANEL + 4,
    TILE_FINISH_BYTES = 16 * TILE_FINISH_STRIDE * 4
};

// Copies a step of both operands: of inputs what begins at `inputs`, nothing where that is null. A row is 64 bytes, so that eight lanes read 128 in a
// row; of a panel's pair, 256 bytes, the quads are exchanged so that pairs 4 q and quads g of eight lanes lie in different banks.
DEVICE void tile_load(const LinearArguments *args, const u32 *weights, const u16 *const *inputs, u8 *stage, u32 first_panel, u32 step) {
    u32 at;
    int copy;
    UNROLL for (copy = 0; copy < TILE_COPIES; copy++) {
        const u16 *from = inputs[copy] ? inputs[copy] + step * 32 : args->input;
        copy_async(stage + (THREAD + copy * (TILE_WARPS * WARP)) * 16, from, inputs[copy] != 0);
    }
    for (at = THREAD; at < TILE_PANELS * 256; at += TILE_WARPS * WARP) {
        u32 panel = first_panel + at / 256, pair = at / 16 % 16, chunk = at % 16;
        int valid = panel < args->panels;
        const u32 *from = weights + (((u64)(valid ? panel : 0) * args->steps + step) * 16 + pair) * PANEL + chunk * 4;
        copy_async(stage + TILE_INPUT_BYTES + at / 16 * 256 + (chunk ^ pair / 4 * 2) * 16, from, valid);
    }
}

// Any number of rows.
KERNEL(linear_tiled, LinearArguments, TILE_WARPS * WARP, 1) {
    SHARED(room);
    u32 lane = THREAD % WARP, warp = THREAD / WARP, g = lane / 4, q = lane % 4;
    u32 row_warp = warp % TILE_ROW_WARPS, panel_warp = warp / TILE_ROW_WARPS;
    u32 first_panel = BLOCK_Y * TILE_PANELS;
    Tile rows = tile_at(&args, BLOCK_X, TILE_ROWS);
    u32 apart = args.partial != 0, run = apart ? BLOCK_Z : 0, last_run = apart ? run : args.splits - 1;
    u32 start = run_start(&args, run), end = run_start(&args, last_run + 1), next_run = run_start(&args, run + 1), step;
    float sums[TILE_MT][2][16], *totals = (float *)(room + TILE_STAGES * TILE_STAGE_BYTES) + THREAD;
    // Warps behind the last row or panel only copy.
    int tile, half, at, i, busy = first_panel + panel_warp < args.panels && row_warp * TILE_MT * 16 < rows.rows;
    const u16 *inputs[TILE_COPIES];
    if (GROUPED && rows.rows == 0) return;
    UNROLL for (at = 0; at < TILE_COPIES; at++) {
        u32 place = THREAD + at * (TILE_WARPS * WARP), row = place / 4;
        inputs[at] = row < rows.rows ? args.input + (u64)input_row(&args, rows.first + row) * args.input_stride + place % 4 * 8 : 0;
    }
    UNROLL for (tile = 0; tile < TILE_MT; tile++)
        UNROLL for (at = 0; at < 32; at++) sums[tile][at / 16][at % 16] = 0.0f;
    UNROLL for (at = 0; at < TILE_STAGES - 1; at++) {
        if (start + at < end) tile_load(&args, rows.weights, inputs, room + at * TILE_STAGE_BYTES, first_panel, start + at);
        copy_commit();
    }
    ROLLED for (step = start; step < end; step++) {
        const u8 *stage = room + (step - start) % TILE_STAGES * TILE_STAGE_BYTES;
        const u8 *panel = stage + TILE_INPUT_BYTES + panel_warp * 4096 + 4 * q * 256;
        u32 ahead = step + TILE_STAGES - 1;
        if (step == next_run) {
            // A run has ended: its sums join those before it.
            UNROLL for (tile = 0; tile < TILE_MT; tile++)
                UNROLL for (at = 0; at < 32; at++) {
                    float *total = totals + (tile * 32 + at) * (TILE_WARPS * WARP);
                    *total = run == 0 ? sums[tile][at / 16][at % 16] : *total + sums[tile][at / 16][at % 16];
                    sums[tile][at / 16][at % 16] = 0.0f;
                }
            run++;
            next_run = run_start(&args, run + 1);
        }
        copy_wait(TILE_STAGES - 2);
        barrier();
        if (ahead < end) tile_load(&args, rows.weights, inputs, room + (ahead - start) % TILE_STAGES * TILE_STAGE_BYTES, first_panel, ahead);
        copy_commit();
        if (!busy) continue;
        quad a[TILE_MT][2];
        UNROLL for (tile = 0; tile < TILE_MT; tile++)
            UNROLL for (i = 0; i < 2; i++)
                a[tile][i] = *(const quad *)(stage + ((row_warp * TILE_MT + tile) * 16 + i * 8 + g) * 64 + q * 16);
        UNROLL for (half = 0; half < 2; half++) {
            quad b[4];
            UNROLL for (i = 0; i < 4; i++) b[i] = *(const quad *)(panel + i * 256 + ((half * 8 + g) ^ q * 2) * 16);
            UNROLL for (tile = 0; tile < TILE_MT; tile++) multiply_step(sums[tile][half], a[tile], b);
        }
    }
    copy_wait(0);
    if (!apart && args.splits > 1) {
        UNROLL for (tile = 0; tile < TILE_MT; tile++)
            UNROLL for (at = 0; at < 32; at++)
                sums[tile][at / 16][at % 16] = totals[(tile * 32 + at) * (TILE_WARPS * WARP)] + sums[tile][at / 16][at % 16];
    }
    if (apart) {
        // [runs][tiles][sums][threads]: whoever ends last adds the runs of the tile, whichever it was.
        u32 block = BLOCK_Y * GRID_X + BLOCK_X, split;
        u64 run_floats = (u64)GRID_X * GRID_Y * (TILE_MT * 32 * TILE_WARPS * WARP);
        float *own = args.partial + (u64)block * (TILE_MT * 32 * TILE_WARPS * WARP) + THREAD;
        UNROLL for (tile = 0; tile < TILE_MT; tile++)
            UNROLL for (at = 0; at < 32; at++)
                own[run * run_floats + (tile * 32 + at) * (TILE_WARPS * WARP)] = sums[tile][at / 16][at % 16];
        see_others();
        barrier();
        if (THREAD == 0) *(u32 *)room = count_up(args.counters + block);
        barrier();
        if (*(const u32 *)room != args.splits - 1) return;
        see_others();
        if (THREAD == 0) args.counters[block] = 0;
        UNROLL for (tile = 0; tile < TILE_MT; tile++)
            UNROLL for (at = 0; at < 32; at++) {
                const float *sum = own + (tile * 32 + at) * (TILE_WARPS * WARP);
                float total = sum[0];
                ROLLED for (split = 1; split < args.splits; split++) total += sum[split * run_floats];
                sums[tile][at / 16][at % 16] = total;
            }
    }
    // Sixteen rows at a time go through shared memory, so that what follows the sums is there once and not for each of them.
    u32 panel = first_panel + panel_warp, gated = args.what == GATE, width = gated ? 4 : 8, unit;
    float *ended = (float *)(room + warp * TILE_FINISH_BYTES);
    barrier();
    ROLLED for (tile = 0; tile < TILE_MT; tile++) {
        UNROLL for (i = 0; i < TILE_MT; i++)
            if (i == tile) UNROLL for (at = 0; at < 32; at++)
                ended[(at / 2 % 2 * 8 + g) * TILE_FINISH_STRIDE + at / 16 * 32 + 8 * q + at % 2 * 4 + at / 4 % 4] = sums[i][at / 16][at % 16];
        warp_barrier();
        ROLLED for (unit = lane; unit < 16 * width; unit += WARP) {
            u32 row = (row_warp * TILE_MT + tile) * 16 + unit / width, column = unit % width * 8;
            float *own = ended + unit / width * TILE_FINISH_STRIDE + column, ends[2][8];
            if (row >= rows.rows || panel >= args.panels) continue;
            row = output_row(&args, rows.first + row);
            UNROLL for (at = 0; at < 8; at++) ends[0][at] = own[at];
            if (gated) UNROLL for (at = 0; at < 8; at++) ends[1][at] = own[32 + at];
            if (gated) finish_gated(&args, row, panel, column, ends[0], ends[1]);
            else finish(&args, row, panel * PANEL + column, ends[0]);
        }
        warp_barrier();
    }
}
#endif
