// Tokens that are drawn: what `engine/src/sampling.rs` makes of a row of logits, without the row leaving the device.
//
// There candidates race: each arrives after an exponential time over its weight, and times are those of numbers that a counter gives. The same numbers
// are made here, but logarithms of floats differ in their last bits from those of doubles. So a winner counts only where it is ahead of all others by more than
// that; else, and where it is not certain to be among the most likely that top-k and top-p keep, the row is left undecided. The processor then
// draws from its logits. That is so for about one row in some thousands.
//
// Where a token stands is its distance: how far its logit lies below the largest, in f32 as on the processor. Equal distances are equal weights, and larger ones
// are not above; so min-p is a limit of distances, and exact. For top-k and top-p `rank` sorts distances times scale into bins: integers are added, in any order.
// All tokens of a bin have nearly the same weight, so the mass above a bin is known well enough, and only the bin at the edge is not.

enum { NONE = 0xffffffffu, UNDECIDED = 0xfffffffeu };

// How the token of a row is drawn (engine/src/sampling/race.rs).
typedef struct ALIGNED(16) {
    float scale;  // 1 / temperature; 0 = the row does not race
    u32 limit;    // bits of the largest distance that min-p keeps
    u32 seed[2], choice, index;
    u32 top_k;    // 0 = all
    float top_p;  // 1 = all
} Terms;

DEVICE int cuts_by_rank(const Terms *terms) { return terms->top_k != 0 || terms->top_p < 1.0f; }

// Whether min-p keeps a distance, which may be -0; one that is no number is not kept.
DEVICE int keeps(const Terms *terms, float distance) { return (float_bits(distance) & 0x7fffffffu) <= terms->limit; }

enum { BINS = 8192 };
// Bins in which weights fall to 1 / e. The last bin holds all beyond: weights below e^-24.
#define BINS_PER_E 340.0f

// Where among the bins a distance lies; the whole part is the number of the bin.
DEVICE float place(float distance, float scale) { return fminf(distance * scale * BINS_PER_E, (float)(BINS - 1)); }

enum { RANK_THREADS = 1024, RANK_WARPS = RANK_THREADS / WARP, OWN_BINS = BINS / RANK_THREADS, BIN_PARTS = 4096 };

typedef struct {
    FIELD(const float *, logits);   // [rows][stride]
    FIELD(const Terms *, terms);    // [rows]
    FIELD(const u32 *, largest);    // [rows]: the column of the largest logit, or NONE
    FIELD(u32 *, edges);            // [rows][2]: bins below the first are kept by top-k and top-p, those from the second on are not
    FIELD(u32, stride);
    FIELD(u32, columns);            // below 2^20, or sums of parts overflow
} RankArguments;

// The mass of `count` tokens of a bin that stand `parts` parts behind its start, together.
DEVICE float bin_mass(u32 count, u32 parts, u32 bin) {
    float middle = count ? (float)parts / ((float)count * BIN_PARTS) + 0.5f / BIN_PARTS : 0.0f;
    return (float)count * expf(-((float)bin + middle) / BINS_PER_E);
}

// Finds the bins at the edges of what top-k and then top-p keep. A block has a row.
KERNEL(rank, RankArguments, RANK_THREADS, 1) {
    SHARED(room);
    const Terms terms = args.terms[BLOCK_X];
    const float *row = args.logits + (u64)BLOCK_X * args.stride;
    u32 *counts = (u32 *)room, *parts = counts + BINS, *own_counts = parts + BINS, *warp_counts = own_counts + RANK_THREADS;
    float *own_masses = (float *)(warp_counts + RANK_WARPS), *warp_masses = own_masses + RANK_THREADS;
    // Bins that top-p keeps for certain, and perhaps; then the same of top-k, and the mass of what it keeps, and how far that may be off.
    u32 *ends = (u32 *)(warp_masses + RANK_WARPS);
    float *kept = (float *)(ends + 4);
    u32 largest = args.largest[BLOCK_X], first = THREAD * OWN_BINS, at, count = 0, total = 0, end;
    float mass = 0.0f, total_mass = 0.0f, most;
    if (terms.scale == 0.0f || !cuts_by_rank(&terms) || largest == NONE) return;
    most = row[largest];
    for (at = THREAD; at < 2 * BINS; at += RANK_THREADS) counts[at] = 0;
    if (THREAD < 2) ends[THREAD] = 0;
    barrier();
    for (at = THREAD; at < args.columns; at += RANK_THREADS) {
        float distance = most - row[at], where;
        if (!keeps(&terms, distance)) continue;
        where = place(distance, terms.scale);
        add_shared(counts + (u32)where, 1);
        add_shared(parts + (u32)where, (u32)((where - (float)(u32)where) * BIN_PARTS));
    }
    barrier();

    // What lies before each thread's bins.
    for (at = first; at < first + OWN_BINS; at++) {
        count += counts[at];
        mass += bin_mass(counts[at], parts[at], at);
    }
    own_counts[THREAD] = count;
    own_masses[THREAD] = mass;
    barrier();
    if (THREAD % WARP == 0) {
        for (at = 1; at < WARP; at++) {
            count += own_counts[THREAD + at];
            mass += own_masses[THREAD + at];
        }
        warp_counts[THREAD / WARP] = count;
        warp_masses[THREAD / WARP] = mass;
    }
    barrier();
    count = 0;
    mass = 0.0f;
    for (at = 0; at < RANK_WARPS; at++) {
        if (at == THREAD / WARP) {
            count = total;
            mass = total_mass;
        }
        total += warp_counts[at];
        total_mass += warp_masses[at];
    }
    for (at = THREAD / WARP * WARP; at < THREAD; at++) {
        count += own_counts[at];
        mass += own_masses[at];
    }

    // Floats are off by less than that; and what the last bin holds is anything up to its start.
    float slack = 2e-5f * total_mass + bin_mass(counts[BINS - 1], 0, BINS - 1);
    if (terms.top_k == 0 || terms.top_k >= total) {
        if (THREAD == 0) {
            ends[2] = ends[3] = BINS;
            kept[0] = total_mass;
            kept[1] = slack;
        }
    } else {
        u32 before = count;
        float mass_before = mass;
        for (at = first; at < first + OWN_BINS; at++) {
            u32 after = before + counts[at];
            float own = bin_mass(counts[at], parts[at], at);
            if (before < terms.top_k && terms.top_k <= after) {
                ends[2] = after == terms.top_k ? at + 1 : at;
                ends[3] = at + 1;
                kept[0] = mass_before + own * ((float)(terms.top_k - before) / (float)counts[at]);
                kept[1] = after == terms.top_k ? slack : slack + own / BINS_PER_E;
            }
            before = after;
            mass_before += own;
        }
    }
    barrier();
    if (terms.top_p < 1.0f) {
        // A token is kept where what lies before it is not yet enough, and the first in any case.
        float enough = terms.top_p * kept[0], off = slack + kept[1], mass_before = mass;
        u32 sure = 0, possible = 0;
        for (at = first; at < first + OWN_BINS; at++) {
            float after = mass_before + bin_mass(counts[at], parts[at], at);
            float before_last = counts[at] > 1 ? after - expf(-(float)(at + 1) / BINS_PER_E) : mass_before;
            sure += before_last == 0.0f || before_last < enough - off;
            possible += mass_before < enough + off;
            mass_before = after;
        }
        add_shared(ends, sure);
        add_shared(ends + 1, possible);
    } else if (THREAD < 2) {
        ends[THREAD] = BINS;
    }
    barrier();
    if (THREAD < 2) {
        end = ends[2 + THREAD];
        args.edges[2 * BLOCK_X + THREAD] = ends[THREAD] < end ? ends[THREAD] : end;
    }
}

enum { RACE_THREADS = 256, RACE_WARPS = RACE_THREADS / WARP, RACE_PAIRS = 4096 };

// Who is ahead of some tokens, and how fast the next is; speeds are logarithms. No token is slower than the next of none.
typedef struct ALIGNED(16) {
    float first, second;
    u32 token, unused;
} Lead;

typedef struct {
    FIELD(const float *, logits);  // [rows][stride]
    FIELD(const Terms *, terms);   // [rows]
    FIELD(u32 *, largest);         // [rows]: the column of the largest logit, or NONE; where a row races, its token or UNDECIDED takes its place
    FIELD(const u32 *, edges);     // [rows][2], as `rank` left them
    FIELD(Lead *, leads);          // [rows][parts]
    FIELD(u32 *, counters);        // [rows], zero between launches
    FIELD(u32, stride);
    FIELD(u32, columns);
} RaceArguments;

DEVICE Lead ahead(Lead a, Lead b) {
    int wins = a.first > b.first || (a.first == b.first && a.token < b.token);
    Lead lead = wins ? a : b;
    lead.second = fmaxf(lead.second, wins ? b.first : a.first);
    return lead;
}

DEVICE Lead warp_lead(Lead lead) {
    int mask;
    UNROLL for (mask = 16; mask; mask /= 2) {
        Lead other;
        other.first = shuffle_xor(lead.first, mask);
        other.second = shuffle_xor(lead.second, mask);
        other.token = shuffle_xor_bits(lead.token, mask);
        other.unused = 0;
        lead = ahead(lead, other);
    }
    return lead;
}

// Philox4x32-10 (engine/src/sampling/random.rs): `counter` becomes four random words.
DEVICE void philox(u32 *counter, u32 key, u32 second_key) {
    int round;
    for (round = 0; round < 10; round++) {
        u64 a = (u64)counter[0] * 0xd2511f53u, b = (u64)counter[2] * 0xcd9e8d57u;
        counter[0] = (u32)(b >> 32) ^ counter[1] ^ key;
        counter[1] = (u32)b;
        counter[2] = (u32)(a >> 32) ^ counter[3] ^ second_key;
        counter[3] = (u32)a;
        key += 0x9e3779b9u;
        second_key += 0xbb67ae85u;
    }
}

// -ln(-ln(number)) of the number in (0, 1) that two random words make: an odd count of 2^-53. Near 1 its distance from there is what counts.
DEVICE float head_start(u32 low, u32 high) {
    u64 number = (((u64)high << 32 | low) >> 12) * 2 + 1, one = (u64)1 << 53;
    float time = number < one / 2 ? -logf((float)number * 0x1p-53f) : -log1pf((float)(one - number) * -0x1p-53f);
    return -logf(time);
}

// Lets the tokens of rows race. Blocks along y share a row; the last to end says who won.
KERNEL(race, RaceArguments, RACE_THREADS, 4) {
    SHARED(room);
    const Terms terms = args.terms[BLOCK_X];
    const float *row = args.logits + (u64)BLOCK_X * args.stride;
    u32 largest = args.largest[BLOCK_X], end = (args.columns + 1) / 2, cut = (u32)cuts_by_rank(&terms), pair, at;
    Lead lead = {-INFINITE, -INFINITE, NONE, 0}, none = lead, *leads = (Lead *)room;
    float most, edge;
    if (terms.scale == 0.0f || largest == NONE) return;
    most = row[largest];
    // What is infinite is certain.
    if (most == INFINITE) return;
    edge = cut ? (float)args.edges[2 * BLOCK_X + 1] : (float)BINS;
    end = end < (BLOCK_Y + 1) * RACE_PAIRS ? end : (BLOCK_Y + 1) * RACE_PAIRS;
    for (pair = BLOCK_Y * RACE_PAIRS + THREAD; pair < end; pair += RACE_THREADS) {
        float distances[2];
        int runs[2];
        UNROLL for (at = 0; at < 2; at++) {
            distances[at] = 2 * pair + at < args.columns ? most - row[2 * pair + at] : INFINITE;
            runs[at] = keeps(&terms, distances[at]) && place(distances[at], terms.scale) < edge;
        }
        if (!runs[0] && !runs[1]) continue;
        u32 words[4] = {terms.index, 0, terms.choice, pair};
        philox(words, terms.seed[0], terms.seed[1]);
        UNROLL for (at = 0; at < 2; at++) {
            float start = head_start(words[2 * at], words[2 * at + 1]);
            Lead own = {start - distances[at] * terms.scale, -INFINITE, 2 * pair + at, 0};
            if (runs[at]) lead = ahead(lead, own);
        }
    }
    lead = warp_lead(lead);
    if (THREAD % WARP == 0) leads[THREAD / WARP] = lead;
    barrier();
    if (THREAD == 0) {
        for (at = 1; at < RACE_WARPS; at++) lead = ahead(lead, leads[at]);
        args.leads[(u64)BLOCK_X * GRID_Y + BLOCK_Y] = lead;
        *(u32 *)room = count_up(args.counters + BLOCK_X);
    }
    barrier();
    if (*(const u32 *)room != GRID_Y - 1 || THREAD >= WARP) return;
    see_others();
    lead = none;
    for (at = THREAD; at < GRID_Y; at += WARP) lead = ahead(lead, args.leads[(u64)BLOCK_X * GRID_Y + at]);
    lead = warp_lead(lead);
    if (THREAD == 0) {
        // Speeds are off by less than half of that: what is slower by more cannot be faster.
        int decided = lead.first - lead.second > 1e-4f;
        if (decided && cut) decided = place(most - row[lead.token], terms.scale) < (float)args.edges[2 * BLOCK_X];
        args.largest[BLOCK_X] = decided ? lead.token : UNDECIDED;
        args.counters[BLOCK_X] = 0;
    }
}
