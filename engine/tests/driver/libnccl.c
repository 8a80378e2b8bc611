// NCCL as far as the engine calls it, for the cards of `libcuda.c`: ranks of one process that gather bytes.
//
// As with the real one, to gather is work of a stream: nothing happens when it is asked for, and a graph remembers it. When the last of the ranks'
// streams has come to it, all parts go to all ranks at once; until then the others stand still, so a rank that never comes shows.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long Address;
typedef struct Stream Stream;
typedef int Meet(void *, int, const void *, void *, size_t);
enum { SUCCESS, UNHANDLED_CUDA_ERROR, SYSTEM_ERROR, INTERNAL_ERROR, INVALID_ARGUMENT, INVALID_USAGE };
enum { UINT8 = 1, MOST_RANKS = 16, LAUNCH_FAILED = 719 };

// What a rank's stream brings, while it waits.
typedef struct { int here; const void *from; char *to; size_t bytes; } Part;
// Streams may still hold work for a clique that has ended, so it lives as long as the process. Its parts are for `meet` alone.
typedef struct { int ranks, came, ended; Part parts[MOST_RANKS]; } Clique;
typedef struct { Clique *clique; int rank, device; } Comm;

static int live;

static int (*queue_meeting)(Stream *, int, Meet *, void *, int, Address, size_t, Address, size_t);
static int (*get_count)(int *);
static void (*finish_meetings)(const void *);
static void (*look_again)(void);

// How many communicators were neither destroyed nor aborted.
int connections(void) { return __atomic_load_n(&live, __ATOMIC_SEQ_CST); }

const char *ncclGetErrorString(int code) {
    static const char *const TEXTS[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error", "invalid argument", "invalid usage"};
    return code >= 0 && code <= INVALID_USAGE ? TEXTS[code] : "unknown result code";
}

int ncclCommInitAll(Comm **comms, int count, const int *devices) {
    void *driver = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
    if (!driver) return SYSTEM_ERROR;
    *(void **)&queue_meeting = dlsym(driver, "queue_meeting");
    *(void **)&finish_meetings = dlsym(driver, "finish_meetings");
    *(void **)&look_again = dlsym(driver, "look_again");
    *(void **)&get_count = dlsym(driver, "cuDeviceGetCount");
    int cards, uses[MOST_RANKS] = {0};
    if (!queue_meeting || !finish_meetings || !look_again || !get_count || get_count(&cards)) return SYSTEM_ERROR;
    if (count < 1 || count > MOST_RANKS) return INVALID_ARGUMENT;
    for (int rank = 0; rank < count; rank++) {
        if (devices[rank] < 0 || devices[rank] >= cards) return INVALID_ARGUMENT;
        if (uses[devices[rank]]++) return INVALID_USAGE;
    }
    Clique *clique = calloc(1, sizeof(Clique));
    clique->ranks = count;
    for (int rank = 0; rank < count; rank++) {
        comms[rank] = calloc(1, sizeof(Comm));
        *comms[rank] = (Comm){clique, rank, devices[rank]};
        __atomic_add_fetch(&live, 1, __ATOMIC_SEQ_CST);
    }
    return SUCCESS;
}

static int meet(void *place, int rank, const void *from, void *to, size_t bytes) {
    Clique *clique = place;
    Part *parts = clique->parts, *own = &parts[rank];
    if (__atomic_load_n(&clique->ended, __ATOMIC_SEQ_CST)) return LAUNCH_FAILED;
    if (!own->here) {
        *own = (Part){1, from, to, bytes};
        clique->came++;
    }
    if (clique->came < clique->ranks) return -1;
    for (int at = 0; at < clique->ranks; at++)
        if (parts[at].bytes != bytes) return LAUNCH_FAILED;
    for (int at = 0; at < clique->ranks; at++)
        for (int part = 0; part < clique->ranks; part++) memcpy(parts[at].to + part * bytes, parts[part].from, bytes);
    for (int at = 0; at < clique->ranks; at++) parts[at].here = 0;
    clique->came = 0;
    return 0;
}

int ncclAllGather(const void *part, void *whole, size_t count, int type, const Comm *comm, Stream *stream) {
    if (type != UINT8 || !count) return INVALID_ARGUMENT;
    if (__atomic_load_n(&comm->clique->ended, __ATOMIC_SEQ_CST)) return INVALID_USAGE;
    Address from = (Address)part, to = (Address)whole;
    int failed = queue_meeting(stream, comm->device, meet, comm->clique, comm->rank, from, count, to, count * comm->clique->ranks);
    return failed ? UNHANDLED_CUDA_ERROR : SUCCESS;
}

static int end(Comm *comm) {
    __atomic_store_n(&comm->clique->ended, 1, __ATOMIC_SEQ_CST);
    __atomic_sub_fetch(&live, 1, __ATOMIC_SEQ_CST);
    look_again();
    free(comm);
    return SUCCESS;
}

int ncclCommAbort(Comm *comm) { return end(comm); }

// All that was asked for is gathered first.
int ncclCommDestroy(Comm *comm) {
    finish_meetings(comm->clique);
    return end(comm);
}
