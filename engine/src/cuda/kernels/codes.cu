// Linears of quantised weights: the sums of `linear.cu`, over weights that are codes.
//
// `weight = scale * (code - zero)`, or with offsets `scale * code + offset`, a scale and an offset for each output and group of inputs. Weights lie
// as the CPU home packs them: for each panel group after group, 64 scales (f16 or f32), 64 offsets if there are any, and words of eight codes of
// four bits or four of eight, 64 outputs side by side. Codes become the 16-bit floats that they are exactly, in registers, and meet the
// inputs as they are; so a *segment* of inputs has an exact scale, its chain of `mma` is multiplied once with it, in f32, and segments are added
// from first to last. A segment is a group, or 128 inputs of a longer one. Runs are whole segments.
//
// Groups hold whole steps, or a step two groups (STEP_GROUPS): then a lane has four inputs of each instead of eight neighbours, so that the two `mma`
// of a step are a group each.
//
// Bytes: what comes from memory is what lies there, 512 bytes of codes of four bits for a step of half a panel, four to six steps ahead of
// use, 16 warps on a processor: 32 KiB on their way, and 4.3 TB/s want 25. Widening costs a code about half an instruction (four bits) to
// two (eight) for all rows of a tile; blocks along y take further rows and find the codes in the second-level cache. Grouped, they take further
// experts too.

typedef struct {
    FIELD(LinearArguments, linear);  // its weights are bytes here
    FIELD(u64, panel_bytes);
    FIELD(u32, group_bytes);
    FIELD(u32, group_inputs);
    FIELD(u32, segment_steps);
    FIELD(u32, inputs);              // codes of an output: those of the last step may be fewer
    FIELD(u32, narrow);              // scales are f16
} CodesArguments;

// CODE: 0 integers of four bits, 1 of eight, 2 e4m3. OFFSETS: there are some. STEP_GROUPS: 1, or 2 of 16 integers of eight bits.
enum { CODES_OF_WORD = CODE ? 4 : 8, CODE_QUADS = CODE ? 2 : 1, LANE_INPUTS = 8 / STEP_GROUPS };

typedef struct { quad a[2 * STREAM_TILES], codes[CODE_QUADS]; } CodesStage;

// Eight bytes.
typedef struct ALIGNED(8) { u32 word[2]; } twin;

// What a segment's sums of eight outputs are multiplied by, and what its sums of inputs are.
typedef struct { float scales[8], offsets[OFFSETS ? 8 : 1]; } SegmentScales;

DEVICE u32 group_inputs(const CodesArguments *args) { return STEP_GROUPS == 2 ? 16 : args->group_inputs; }

DEVICE const u8 *group_at(const CodesArguments *args, const u8 *panel, u32 input) {
    return panel + (u64)(input / group_inputs(args)) * args->group_bytes;
}

// First input of a part of a step that lies in one group.
DEVICE u32 part_start(u32 step, int part) { return step * 32 + part * 16; }

// The group that has the scales of a part of a step: of one behind the last input, those of the last.
DEVICE const u8 *scales_at(const CodesArguments *args, const u8 *panel, u32 step, int part) {
    u32 first = part_start(step, part);
    return group_at(args, panel, STEP_GROUPS == 1 || first < args->inputs ? first : args->inputs - 1);
}

DEVICE u32 header_bytes(const CodesArguments *args) { return PANEL * (args->narrow ? 2 : 4) + OFFSETS * PANEL * 4; }

// Loads a lane's codes of four outputs: eight inputs of each.
DEVICE void words_load(const CodesArguments *args, quad *codes, const u8 *panel, u32 column, u32 step) {
    quad none = {{0, 0, 0, 0}};
    int part, at;
    UNROLL for (part = 0; part < STEP_GROUPS; part++) {
        u32 first = part_start(step, part) + LANE_INPUTS * (THREAD % WARP % 4);
        const u8 *words = group_at(args, panel, first) + header_bytes(args) + (u64)(first % group_inputs(args) / CODES_OF_WORD * PANEL + column) * 4;
        UNROLL for (at = 0; at < CODE_QUADS / STEP_GROUPS; at++)
            codes[part + at] = first + at * CODES_OF_WORD < args->inputs ? load_once(words + at * PANEL * 4) : none;
    }
}

// Loads the inputs that meet them, of rows g + 8 * at.
DEVICE quad codes_inputs(const LaneInputs *inputs, int at, u32 step) {
#if STEP_GROUPS == 1
    return load_inputs(inputs, at, step);
#else
    quad none = {{0, 0, 0, 0}};
    // There eight neighbours would begin.
    const u16 *from = inputs->from[at] + step * 32 - 4 * (THREAD % WARP % 4);
    if (!inputs->from[at]) return none;
    twin low = *(const twin *)from, high = *(const twin *)(from + 16);
    quad both = {{low.word[0], low.word[1], high.word[0], high.word[1]}};
    return both;
#endif
}

DEVICE void codes_load(const CodesArguments *args, CodesStage *stage, const u8 *panel, u32 column, const LaneInputs *inputs, u32 step, u32 end) {
    int at;
    if (step >= end) return;
    words_load(args, stage->codes, panel, column, step);
    UNROLL for (at = 0; at < 2 * STREAM_TILES; at++) stage->a[at] = codes_inputs(inputs, at, step);
}

DEVICE float scale_of(const CodesArguments *args, const u8 *group, u32 column) {
    return args->narrow ? f16_float(((const u16 *)group)[column]) : ((const float *)group)[column];
}

DEVICE float offset_of(const CodesArguments *args, const u8 *group, u32 column) {
    return ((const float *)(group + PANEL * (args->narrow ? 2 : 4)))[column];
}

DEVICE void scales_load(const CodesArguments *args, SegmentScales *to, const u8 *panel, u32 column, u32 step, int part) {
    const u8 *group = scales_at(args, panel, step, part);
    int at;
    UNROLL for (at = 0; at < 8; at++) {
        to->scales[at] = scale_of(args, group, column + at);
        if (OFFSETS) to->offsets[at % (OFFSETS ? 8 : 1)] = offset_of(args, group, column + at);
    }
}

// Widens a step's codes of four outputs to pairs of 16-bit floats: b[i].word[j] is pair i of output j. Integers without offsets count from
// the middle.
DEVICE void widen_codes(const quad *codes, quad *b) {
    int j, i;
    UNROLL for (j = 0; j < 4; j++) {
#if CODE == 0
        // A pair's codes stand in the two halves of the word. 128 (f16: 1024) is a number whose last bit is worth one.
        u32 less = F16 ? (OFFSETS ? 0xe400e400u : 0xe408e408u) : (OFFSETS ? 0xc300c300u : 0xc308c308u);
        UNROLL for (i = 0; i < 4; i++)
            b[i].word[j] = pair_fma((codes[0].word[j] >> 4 * i & 0x000f000fu) | (F16 ? 0x64006400u : 0x43004300u), F16 ? 0x3c003c00u : 0x3f803f80u, less);
#else
        UNROLL for (i = 0; i < 4; i++) {
            u32 word = codes[i / 2].word[j];
#if CODE == 1
            // 2^23 is a number whose last bit is worth one.
            float less = OFFSETS ? 8388608.0f : 8388736.0f;
            float low = bits_float(pick_bytes(word, 0x4b000000u, 0x7540 + i % 2 * 2)) - less;
            float high = bits_float(pick_bytes(word, 0x4b000000u, 0x7541 + i % 2 * 2)) - less;
            b[i].word[j] = narrow_pair(low, high);
#else
            // The exponent's bias is 7 and not 127 (f16: 15): it is too small by 120 (8).
            u32 bytes = pick_bytes(word, 0, i % 2 ? 0x4342 : 0x4140);
            u32 sign = (bytes & 0x00800080u) << 8, magnitude = (bytes & 0x007f007fu) << (F16 ? 7 : 4);
            b[i].word[j] = pair_fma(sign | magnitude, F16 ? 0x5c005c00u : 0x7b807b80u, 0);
#endif
        }
#endif
    }
}

// Brings inputs into the order of widened codes.
DEVICE quad order_inputs(quad a) {
#if CODE == 0
    // Nibbles 0 and 4 of a word are codes 0 and 2, its next 1 and 3, then 4 and 6, 5 and 7.
    quad ordered = {{pick_bytes(a.word[0], a.word[1], 0x5410), pick_bytes(a.word[0], a.word[1], 0x7632),
                     pick_bytes(a.word[2], a.word[3], 0x5410), pick_bytes(a.word[2], a.word[3], 0x7632)}};
    return ordered;
#else
    return a;
#endif
}

// First step of a run of whole segments.
DEVICE u32 codes_run_start(const CodesArguments *args, u32 run) {
    u32 steps = args->linear.steps, segments = (steps + args->segment_steps - 1) / args->segment_steps;
    u32 step = (u32)((u64)segments * run / args->linear.splits) * args->segment_steps;
    return step < steps ? step : steps;
}

// Adds a segment's sums to those before it, and begins with nothing again.
DEVICE void end_segment(const SegmentScales *scales, float *inputs, float *sums, float *totals) {
    int i, e, j;
    UNROLL for (i = 0; i < 2; i++) {
        if (OFFSETS) {
            inputs[i] += shuffle_xor(inputs[i], 1);
            inputs[i] += shuffle_xor(inputs[i], 2);
        }
        UNROLL for (e = 0; e < 2; e++)
            UNROLL for (j = 0; j < 4; j++) {
                int at = 4 * j + 2 * i + e;
                totals[at] = fmaf(scales->scales[4 * e + j], sums[at], totals[at]);
                if (OFFSETS) totals[at] = fmaf(scales->offsets[(4 * e + j) % (OFFSETS ? 8 : 1)], inputs[i], totals[at]);
                sums[at] = 0.0f;
            }
        inputs[i] = 0.0f;
    }
}

// Any number of rows: blocks along y take 16 * STREAM_TILES each, along x 8 / splits halves of panels.
KERNEL(linear_codes, CodesArguments, STREAM_WARPS * WARP, STREAM_BLOCKS) {
    SHARED(room);
    u32 lane = THREAD % WARP, warp = THREAD / WARP, g = lane / 4, q = lane % 4, splits = args.linear.splits;
    u32 halves = STREAM_WARPS / splits, run = warp % splits, half = BLOCK_X * halves + warp / splits;
    Tile rows = tile_at(&args.linear, BLOCK_Y, STREAM_ROWS);
    float totals[STREAM_TILES][16], sums[STREAM_TILES][16], inputs[STREAM_TILES][2];
    int at, tile, stage, part, i;
    if (GROUPED && rows.rows == 0) return;
    UNROLL for (tile = 0; tile < STREAM_TILES; tile++) {
        UNROLL for (at = 0; at < 16; at++) totals[tile][at] = sums[tile][at] = 0.0f;
        inputs[tile][0] = inputs[tile][1] = 0.0f;
    }
    if (half < 2 * args.linear.panels) {
        const u8 *panel = (const u8 *)rows.weights + (u64)(half / 2) * args.panel_bytes;
        LaneInputs lane = lane_inputs(&args.linear, &rows);
        u32 column = half % 2 * 32 + 4 * g, outputs = half % 2 * 32 + 8 * q;
        u32 step = codes_run_start(&args, run), end = codes_run_start(&args, run + 1), left = args.segment_steps;
        CodesStage stages[STREAM_STAGES];
        SegmentScales scales;
        UNROLL for (stage = 0; stage < STREAM_STAGES; stage++) codes_load(&args, &stages[stage], panel, column, &lane, step + stage, end);
        for (; step < end; step += STREAM_STAGES) {
            UNROLL for (stage = 0; stage < STREAM_STAGES; stage++) {
                if (step + stage >= end) break;
                UNROLL for (part = 0; part < STEP_GROUPS; part++) {
                    if (left == args.segment_steps) scales_load(&args, &scales, panel, outputs, step + stage, part);
                    quad b[4];
                    widen_codes(stages[stage].codes, b);
                    UNROLL for (tile = 0; tile < STREAM_TILES; tile++) {
                        quad a[2];
                        UNROLL for (i = 0; i < 2; i++) {
                            quad own = stages[stage].a[2 * tile + i];
                            a[i] = order_inputs(own);
                            if (OFFSETS)
                                UNROLL for (at = part * LANE_INPUTS / 2; at < (part + 1) * LANE_INPUTS / 2; at++)
                                    inputs[tile][i] += wide((u16)own.word[at]) + wide((u16)(own.word[at] >> 16));
                        }
                        UNROLL for (i = part; i < part + 2 / STEP_GROUPS; i++) multiply_half(sums[tile], a, b, i);
                    }
                    if (part + 1 == STEP_GROUPS) codes_load(&args, &stages[stage], panel, column, &lane, step + STREAM_STAGES + stage, end);
                    if (--left && step + stage + 1 < end) continue;
                    // A segment has ended.
                    left = args.segment_steps;
                    UNROLL for (tile = 0; tile < STREAM_TILES; tile++) end_segment(&scales, inputs[tile], sums[tile], totals[tile]);
                }
            }
        }
    }
    leave_sums(room, totals);
    join_runs(&args.linear, room, BLOCK_X * halves, halves, &rows);
}

#if STREAM_TILES == 1 && !GROUPED
typedef struct {
    FIELD(CodesArguments, codes);  // of the linear whose weights are to be laid out
    FIELD(u8 *, to);               // [panels * 64][32 steps] 16-bit floats; or e4m3 or signed integers of eight bits
    FIELD(float *, scales);        // [panels * 64], of those of eight bits; null where weights are to be widened
} LayCodesArguments;

// Lays weights out output after output, as libraries have them: widened, or codes of eight bits as they are beside the one scale of each output. A warp
// takes a step of half a panel.
KERNEL(lay_codes, LayCodesArguments, STREAM_WARPS * WARP, 2) {
    u32 lane = THREAD % WARP, g = lane / 4, q = lane % 4, steps = args.codes.linear.steps;
    u32 index = BLOCK_X * STREAM_WARPS + THREAD / WARP, half = index / steps, step = index % steps;
    u32 column = half % 2 * 32 + 4 * g, output = half * 32 + 4 * g;
    u64 inputs = (u64)steps * 32, first = step * 32 + LANE_INPUTS * q;
    quad codes[CODE_QUADS], b[4];
    int part, i, j;
    if (half >= 2 * args.codes.linear.panels) return;
    const u8 *panel = (const u8 *)args.codes.linear.weights + (u64)(half / 2) * args.codes.panel_bytes;
    words_load(&args.codes, codes, panel, column, step);
#if CODE && !OFFSETS && STEP_GROUPS == 1
    if (args.scales) {
        UNROLL for (j = 0; j < 4; j++) {
            // Integers count from 128.
            u32 *to = (u32 *)(args.to + (output + j) * inputs + first);
            UNROLL for (i = 0; i < 2; i++) to[i] = codes[i].word[j] ^ (CODE == 1 ? 0x80808080u : 0);
            if (first == 0) args.scales[output + j] = scale_of(&args.codes, panel, column + j);
        }
        return;
    }
#endif
    widen_codes(codes, b);
    UNROLL for (j = 0; j < 4; j++) {
        u16 *to = (u16 *)args.to + (output + j) * inputs + first;
        quad pairs;
        UNROLL for (part = 0; part < STEP_GROUPS; part++) {
            const u8 *group = scales_at(&args.codes, panel, step, part);
            float scale = scale_of(&args.codes, group, column + j), offset = OFFSETS ? offset_of(&args.codes, group, column + j) : 0.0f;
            UNROLL for (i = part * LANE_INPUTS / 2; i < (part + 1) * LANE_INPUTS / 2; i++)
                pairs.word[i] = narrow_pair(scale * wide((u16)b[i].word[j]) + offset, scale * wide((u16)(b[i].word[j] >> 16)) + offset);
        }
#if STEP_GROUPS == 1
        // To bring inputs into the order of codes is to bring codes into that of inputs.
        *(quad *)to = order_inputs(pairs);
#else
        UNROLL for (part = 0; part < 2; part++) {
            twin own = {{pairs.word[2 * part], pairs.word[2 * part + 1]}};
            *(twin *)(to + 16 * part) = own;
        }
#endif
    }
}
#endif
