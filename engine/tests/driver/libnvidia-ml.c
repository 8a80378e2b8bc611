// Stands in for NVIDIA's management library: three cards, each of which is found by its name and says what it is doing. The second has no sensors of
// power and heat, as a part of a card has none.
#include <stdio.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum { SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NOT_FOUND = 6 };

typedef struct { int number; } Device;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;

static Device devices[3] = {{0}, {1}, {2}};
static int open_count;

EXPORT int nvmlInit_v2(void) { open_count++; return SUCCESS; }
EXPORT int nvmlShutdown(void) { return open_count-- > 0 ? SUCCESS : UNINITIALIZED; }
EXPORT const char *nvmlErrorString(int code) { (void)code; return "an error"; }
EXPORT int nvmlSystemGetDriverVersion(char *text, unsigned room) { snprintf(text, room, "570.1"); return SUCCESS; }
EXPORT int nvmlSystemGetNVMLVersion(char *text, unsigned room) { snprintf(text, room, "12.570.1"); return SUCCESS; }

EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
    for (int at = 0; at < 3; at++) {
        char name[64], pair[3];
        snprintf(pair, sizeof pair, "%02x", 0xa0 + at);
        // The second is a part of a card.
        int length = snprintf(name, sizeof name, at == 1 ? "MIG-" : "GPU-");
        for (int byte = 0; byte < 16; byte++)
            length += snprintf(name + length, sizeof name - length, byte == 4 || byte == 6 || byte == 8 || byte == 10 ? "-%s" : "%s", pair);
        if (!strcmp(name, uuid)) { *device = &devices[at]; return SUCCESS; }
    }
    return NOT_FOUND;
}

EXPORT int nvmlDeviceGetMemoryInfo_v2(Device *device, Memory *memory) {
    if (memory->version != (sizeof *memory | 2 << 24)) return INVALID_ARGUMENT;
    memory->total = 80ull << 30;
    memory->used = (unsigned long long)(device->number + 1) << 30;
    return SUCCESS;
}
EXPORT int nvmlDeviceGetUtilizationRates(Device *device, Utilization *rates) { rates->gpu = 40 + device->number; return SUCCESS; }
EXPORT int nvmlDeviceGetPowerUsage(Device *device, unsigned *milliwatts) { *milliwatts = 350500; return device->number == 1 ? NOT_SUPPORTED : SUCCESS; }
EXPORT int nvmlDeviceGetTemperature(Device *device, unsigned sensor, unsigned *celsius) {
    *celsius = 61 + sensor;
    return device->number == 1 ? NOT_SUPPORTED : SUCCESS;
}
