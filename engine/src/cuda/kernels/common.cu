// What several kernels share. Weights and what meets them are 16-bit floats: bf16, or f16 where `F16` is 1.

// A field of a kernel's arguments: eight bytes each, so that arguments are an array of words.
#define FIELD(type, name) ALIGNED(8) type name

#if F16
DEVICE float wide(u16 bits) { return f16_float(bits); }
DEVICE u16 narrow(float value) { return f16_from(value); }
DEVICE u32 narrow_pair(float low, float high) { return f16_from(low) | (u32)f16_from(high) << 16; }
#define mma mma_f16
#define pair_fma f16_pair_fma
#else
DEVICE float wide(u16 bits) { return bits_float((u32)bits << 16); }
DEVICE u16 narrow(float value) { return bf16_from(value); }
DEVICE u32 narrow_pair(float low, float high) { return bf16_pair(low, high); }
#define mma mma_bf16
#define pair_fma bf16_pair_fma
#endif

// Rounds to the bits of the nearest e4m3, up to 448, as kv-cache/src/byte_code.rs does.
DEVICE u8 e4m3_from(float value) {
    u32 bits = float_bits(value), magnitude = bits & 0x7fffffffu, code;
    if (magnitude < (127u - 6) << 23) code = float_bits(bits_float(magnitude) + 16384.0f) - float_bits(16384.0f);
    else {
        code = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - ((127 - 7) << 3);
        if (code > 0x7e) code = 0x7e;
    }
    return (u8)((bits >> 24 & 0x80) | code);
}

// Rounds to the nearest integer from -127 to 127.
DEVICE u8 int8_from(float value) {
    value = rintf(value);
    return (u8)(i8)(value > 127.0f ? 127.0f : value < -127.0f ? -127.0f : value);
}

// Outputs of a panel of packed weights (engine/src/cpu/packed.rs).
enum { PANEL = 64, WARP = 32 };

// Where the pair of inputs `pair` of output `column` stands in packed weights of `steps` times 32 inputs, in u32.
DEVICE u64 panel_pair(u32 column, u32 pair, u32 steps) {
    return ((u64)(column / PANEL) * steps * 16 + pair) * PANEL + column % PANEL;
}

// The sum over the lanes of a warp, the same bits in each.
DEVICE float warp_sum(float value) {
    int mask;
    UNROLL for (mask = 16; mask; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// The sum over the threads of a block, the same bits in each; `room` holds a float for each warp.
DEVICE float block_sum(float value, float *room) {
    u32 warp;
    float sum = 0.0f;
    value = warp_sum(value);
    barrier();
    if (THREAD % WARP == 0) room[THREAD / WARP] = value;
    barrier();
    for (warp = 0; warp < THREADS / WARP; warp++) sum += room[warp];
    return sum;
}
