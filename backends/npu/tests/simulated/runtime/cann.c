// SPDX-License-Identifier: Apache-2.0
// A simulated CANN runtime below the real torch_npu: streams, events, capture, task update.
//
// Device memory is host memory with a limit, poisoned when taken.  A stream is a queue of tasks;
// an operator is a task whose body is a Python function (bodies.py).  When a task runs is the
// schedule's choice (SIM_SCHEDULE):
//   eager   at once, if nothing blocks it          lazy    only when somebody waits
//   random  when somebody waits, streams by lot     thread  by a thread of its own
// A stream that can never go on is reported as a dead-lock instead of hanging.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "acl/acl.h"

enum { RT_CAPTURE_ILLEGAL = 107027, RT_CAPTURE_COPY = 107030, RT_UNJOINED = 107025,
       RT_INVALID_DEVICE = 107001, RT_NO_MEMORY = 207001, RT_NO_STREAM = 207008,
       RT_CAPTURE_BROKEN = 507903, RT_TASK_FAILED = 507015, RT_DEADLOCK = 507014,
       RT_UNSUPPORTED = 561103, RT_UPDATE_MISMATCH = 107037 };

// ---- objects that operators take: one arena, so that a pointer can be recognised ----

enum { TENSOR = 1, SCALAR, INTS, TENSORS, BOOLS, FLOATS, SCALARS };
typedef struct Obj {
    int64_t kind, dtype, count, dims[8], strides[8], offset;
    void *data;          // tensor's memory, or the values of an array
    struct Obj **items;  // of lists
    struct Obj *next_free;
} Obj;

enum { ARENA_OBJECTS = 1 << 20 };
static Obj *arena;
static Obj *free_objects;
static size_t used_objects;
static pthread_mutex_t arena_lock = PTHREAD_MUTEX_INITIALIZER;

static Obj *new_obj(int kind) {
    pthread_mutex_lock(&arena_lock);
    if (!arena)
        arena = mmap(NULL, ARENA_OBJECTS * sizeof(Obj), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    Obj *o = free_objects;
    if (o) free_objects = o->next_free;
    else if (used_objects < ARENA_OBJECTS) o = &arena[used_objects++];
    else { fprintf(stderr, "simulated runtime: no room for operands\n"); abort(); }
    pthread_mutex_unlock(&arena_lock);
    memset(o, 0, sizeof *o);
    o->kind = kind;
    return o;
}
static int is_obj(const void *p) {
    uintptr_t at = (uintptr_t)p, base = (uintptr_t)arena;
    return arena && at >= base && at < base + used_objects * sizeof(Obj) &&
           (at - base) % sizeof(Obj) == 0 && ((Obj *)p)->kind;
}
static void free_obj(Obj *o) {
    if (!o) return;
    if (o->kind != TENSOR) free(o->data);
    if (o->items) {
        for (int64_t i = 0; i < o->count; i++) free_obj(o->items[i]);
        free(o->items);
    }
    pthread_mutex_lock(&arena_lock);
    o->kind = 0;
    o->next_free = free_objects;
    free_objects = o;
    pthread_mutex_unlock(&arena_lock);
}
static size_t value_bytes(const Obj *o) {
    switch (o->kind) {
        case SCALAR: return 16;
        case INTS: return o->count * 8;
        case BOOLS: return o->count;
        case FLOATS: return o->count * 4;
        default: return 0;
    }
}
static Obj *copy_obj(const Obj *from) {
    Obj *o = new_obj(from->kind);
    *o = *from;
    if (from->kind != TENSOR && from->data) {
        o->data = malloc(value_bytes(from) + 1);
        memcpy(o->data, from->data, value_bytes(from));
    }
    if (from->items) {
        o->items = malloc(sizeof(Obj *) * (from->count + 1));
        for (int64_t i = 0; i < from->count; i++) o->items[i] = copy_obj(from->items[i]);
    }
    return o;
}
static Obj *array(int kind, const void *values, uint64_t count, size_t each) {
    Obj *o = new_obj(kind);
    o->count = count;
    o->data = malloc(count * each + 1);
    if (count) memcpy(o->data, values, count * each);
    return o;
}
Obj *aclCreateTensor(const int64_t *dims, uint64_t n, int dtype, const int64_t *strides,
                     int64_t offset, int format, const int64_t *storage, uint64_t m, void *data) {
    (void)format; (void)storage; (void)m;
    Obj *o = new_obj(TENSOR);
    o->dtype = dtype; o->count = n; o->offset = offset; o->data = data;
    for (uint64_t i = 0; i < n && i < 8; i++) { o->dims[i] = dims[i]; o->strides[i] = strides[i]; }
    return o;
}
Obj *aclCreateScalar(void *value, int dtype) {
    static const int wide[] = {[ACL_DOUBLE] = 8, [ACL_INT64] = 8, [ACL_FLOAT] = 4, [ACL_INT32] = 4,
                               [ACL_BOOL] = 1, [ACL_FLOAT16] = 2, [ACL_BF16] = 2, [ACL_UINT8] = 1,
                               [ACL_INT8] = 1, [ACL_INT16] = 2, [ACL_UINT64] = 8, [ACL_UINT32] = 4};
    Obj *o = new_obj(SCALAR);
    o->dtype = dtype;
    o->data = calloc(1, 16);
    int bytes = dtype >= 0 && dtype < (int)(sizeof wide / sizeof *wide) ? wide[dtype] : 8;
    memcpy(o->data, value, bytes);
    return o;
}
Obj *aclCreateIntArray(const int64_t *v, uint64_t n) { return array(INTS, v, n, 8); }
Obj *aclCreateBoolArray(const _Bool *v, uint64_t n) { return array(BOOLS, v, n, 1); }
Obj *aclCreateFloatArray(const float *v, uint64_t n) { return array(FLOATS, v, n, 4); }
static Obj *list(int kind, Obj *const *v, uint64_t n) {
    Obj *o = new_obj(kind);
    o->count = n;
    o->items = malloc(sizeof(Obj *) * (n + 1));
    for (uint64_t i = 0; i < n; i++) o->items[i] = copy_obj(v[i]);
    return o;
}
Obj *aclCreateTensorList(Obj *const *v, uint64_t n) { return list(TENSORS, v, n); }
Obj *aclCreateScalarList(Obj *const *v, uint64_t n) { return list(SCALARS, v, n); }
int aclDestroyTensor(Obj *o) { free_obj(o); return 0; }
int aclDestroyScalar(Obj *o) { free_obj(o); return 0; }
int aclDestroyIntArray(Obj *o) { free_obj(o); return 0; }
int aclDestroyBoolArray(Obj *o) { free_obj(o); return 0; }
int aclDestroyFloatArray(Obj *o) { free_obj(o); return 0; }
int aclDestroyTensorList(Obj *o) { free_obj(o); return 0; }
int aclDestroyScalarList(Obj *o) { free_obj(o); return 0; }

// ---- tasks ----

enum { MOST_ARGUMENTS = 72 };
typedef struct { int64_t is_obj, value; char text[32]; Obj *obj; } Arg;
typedef struct Op {  // one call of an operator, its arguments copied; bodies.py reads it
    int64_t index, count;
    double doubles[8];
    float floats[8];
    Arg args[MOST_ARGUMENTS];
} Op;

static void free_op(Op *op) {
    for (int64_t i = 0; i < op->count; i++) free_obj(op->args[i].obj);
    free(op);
}

enum { OP, COPY, SET, RECORD, WAIT, VALUE_WRITE, VALUE_WAIT, LAUNCH, UPDATE, HOST };
typedef struct Task {
    int kind;
    Op *op;
    void *to; const void *from; size_t bytes; int byte;
    uint64_t *address; uint64_t value; uint32_t flag;
    struct Event *event; uint64_t sequence;
    struct Graph *graph; size_t at;
    struct Group *group; struct Task *fresh; size_t fresh_count;
    void (*call)(void *); void *argument;
} Task;
typedef struct { Task *items; size_t count, room; } Tasks;
typedef struct Group { struct Graph *graph; size_t first, count; } Group;
typedef struct Graph { Tasks tasks; int mode, broken, streams; } Graph;
typedef struct Stream {
    Tasks queue; size_t head; int busy, id;
    Graph *capture; int origin;
    Group *open;          // task group that is being recorded
    Group *updating; Tasks fresh;
    struct Stream *next;
} Stream;
typedef struct Event { uint64_t issued, done; Graph *graph; int forked; } Event;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t moved = PTHREAD_COND_INITIALIZER;
static Stream *streams;
static int stream_count, captures, live_graphs, schedule, worker_made;
static uint64_t submitted;
static unsigned seed = 1;
static int failure;
static char message[2048];
typedef int (*Body)(Op *op);
static Body body;
extern const char *const sim_names[];

static long number(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atol(text) : otherwise;
}
static int fail(int code, const char *text) {
    snprintf(message, sizeof message, "[simulated runtime] error code is %d: %s", code, text);
    return code;
}
void sim_set_body(Body function) { body = function; }
void sim_report(const char *text) { snprintf(message, sizeof message, "[simulated runtime] %s", text); }
const char *aclGetRecentErrMsg() { return message; }

static void *grow(void *items, size_t count, size_t *room, size_t each) {
    if (count < *room) return items;
    *room = *room ? 2 * *room : 16;
    return realloc(items, *room * each);
}
static void push(Tasks *tasks, Task task) {
    tasks->items = grow(tasks->items, tasks->count, &tasks->room, sizeof(Task));
    tasks->items[tasks->count++] = task;
}

// The interpreter's lock must not be held while we wait for somebody who needs it.
static void *release_python(void) {
    static int (*held)(void);
    static void *(*save)(void);
    if (!held) {
        held = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Check");
        save = (void *(*)(void))dlsym(RTLD_DEFAULT, "PyEval_SaveThread");
    }
    return held && held() ? save() : NULL;
}
static void take_python(void *state) {
    static void (*restore)(void *);
    if (!restore) restore = (void (*)(void *))dlsym(RTLD_DEFAULT, "PyEval_RestoreThread");
    if (state) restore(state);
}

// Runs one task; 0 = blocked.  Called with the lock, which is given up during a body.
static int perform(Task *t) {
    switch (t->kind) {
        case OP: {
            Op *op = t->op;
            pthread_mutex_unlock(&lock);
            int code = body ? body(op) : RT_TASK_FAILED;
            pthread_mutex_lock(&lock);
            if (code) failure = RT_TASK_FAILED;
            return 1;
        }
        case COPY: memmove(t->to, t->from, t->bytes); return 1;
        case SET: memset(t->to, t->byte, t->bytes); return 1;
        case RECORD:
            if (t->event->done < t->sequence) t->event->done = t->sequence;
            return 1;
        case WAIT: return t->event->done >= t->sequence;
        case VALUE_WRITE: *t->address = t->value; return 1;
        case VALUE_WAIT:
            switch (t->flag) {
                case 0: return (int64_t)(*t->address - t->value) >= 0;
                case 1: return *t->address == t->value;
                case 2: return (*t->address & t->value) != 0;
                default: return *t->address != t->value;
            }
        case LAUNCH:
            while (t->at < t->graph->tasks.count) {
                if (!perform(&t->graph->tasks.items[t->at])) return 0;
                t->at++;
            }
            return 1;
        case UPDATE:
            for (size_t i = 0; i < t->fresh_count; i++) {
                Task *old = &t->group->graph->tasks.items[t->group->first + i];
                free_op(old->op);
                old->op = t->fresh[i].op;
            }
            free(t->fresh);
            return 1;
        case HOST: t->call(t->argument); return 1;
    }
    return 1;
}
static int step(Stream *s) {
    if (s->busy || s->head == s->queue.count) return 0;
    s->busy = 1;
    Task task = s->queue.items[s->head];  // the queue may move while a body runs
    int done = perform(&task);
    s->busy = 0;
    if (!done) { s->queue.items[s->head].at = task.at; return 0; }
    if (task.kind == OP) free_op(task.op);  // recorded ones stay with their graph
    if (++s->head == s->queue.count) s->head = s->queue.count = 0;
    pthread_cond_broadcast(&moved);
    return 1;
}
static int step_any(Stream *first) {
    if (schedule == 2) {
        Stream *all[4096];
        int n = 0;
        for (Stream *s = streams; s && n < 4096; s = s->next) all[n++] = s;
        for (int i = n - 1; i > 0; i--) {
            int j = rand_r(&seed) % (i + 1);
            Stream *x = all[i]; all[i] = all[j]; all[j] = x;
        }
        for (int i = 0; i < n; i++) if (step(all[i])) return 1;
        return 0;
    }
    // Whoever is not waited for runs ahead as far as it can: the worst order for us.
    for (Stream *s = streams; s; s = s->next) if (s != first && step(s)) return 1;
    return first ? step(first) : 0;
}
static void *work(void *unused) {
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        uint64_t seen = submitted;  // a body gives the lock up, and something may come meanwhile
        if (!step_any(NULL) && seen == submitted) pthread_cond_wait(&moved, &lock);
    }
    return NULL;
}
static void choose_schedule(void) {
    static int chosen;
    if (chosen) return;
    chosen = 1;
    const char *name = getenv("SIM_SCHEDULE");
    schedule = !name || !strcmp(name, "lazy") ? 1 : !strcmp(name, "eager") ? 0
             : !strcmp(name, "random") ? 2 : 3;
    seed = number("SIM_SEED", 1);
}
static int pending(Stream *s) { return s->busy || s->head < s->queue.count; }

typedef int (*Ready)(void *);
static int stream_done(void *s) { return !pending(s); }
static int all_done(void *unused) {
    (void)unused;
    for (Stream *s = streams; s; s = s->next) if (pending(s)) return 0;
    return 1;
}
static int event_done(void *e) { return ((Event *)e)->done >= ((Event *)e)->issued; }

// Waits with the lock held by nobody; reports a dead-lock after SIM_PATIENCE milliseconds.
static int until(Ready ready, void *what, Stream *first) {
    long patience = number("SIM_PATIENCE", schedule == 3 ? 5000 : 500);
    void *python = schedule == 3 ? release_python() : NULL;
    int code = 0;
    pthread_mutex_lock(&lock);
    while (!ready(what)) {
        if (schedule != 3 && step_any(first)) continue;
        struct timespec limit;
        clock_gettime(CLOCK_REALTIME, &limit);
        limit.tv_sec += patience / 1000;
        limit.tv_nsec += patience % 1000 * 1000000;
        limit.tv_sec += limit.tv_nsec / 1000000000;
        limit.tv_nsec %= 1000000000;
        pthread_cond_broadcast(&moved);
        if (pthread_cond_timedwait(&moved, &lock, &limit) && !ready(what)) {
            int busy = 0;
            for (Stream *s = streams; s; s = s->next) busy |= s->busy;
            if (busy) continue;
            code = fail(RT_DEADLOCK, "dead-lock: a stream waits for what never comes");
            if (getenv("SIM_TRACE"))
                for (Stream *s = streams; s; s = s->next)
                    if (pending(s))
                        fprintf(stderr, "stream %d: %zu of %zu done, the next is of kind %d\n",
                                s->id, s->head, s->queue.count, s->queue.items[s->head].kind);
            for (Stream *s = streams; s; s = s->next) s->head = s->queue.count = 0;
            break;
        }
    }
    if (!code && failure) { code = failure; failure = 0; }
    pthread_mutex_unlock(&lock);
    take_python(python);
    return code;
}
static int submit(Stream *s, Task task) {
    pthread_mutex_lock(&lock);
    submitted++;
    if (s->capture) {
        if (task.kind == LAUNCH || task.kind == UPDATE) s->capture->broken = 1;
        push(&s->capture->tasks, task);
    } else if (s->updating && task.kind == OP) {
        push(&s->fresh, task);
    } else {
        push(&s->queue, task);
        if (schedule == 0) while (step(s)) {}
        pthread_cond_broadcast(&moved);
    }
    pthread_mutex_unlock(&lock);
    return 0;
}
static int illegal(Graph *graph, const char *what) {
    if (graph) graph->broken = 1;
    else for (Stream *s = streams; s; s = s->next) if (s->capture) s->capture->broken = 1;
    return fail(RT_CAPTURE_ILLEGAL, what);
}

// ---- operators ----

int sim_prepare(int64_t index, int64_t *regs, double *vectors, int64_t *stack) {
    Op *op = calloc(1, sizeof(Op));
    op->index = index;
    for (int i = 0; i < 8; i++) {
        op->doubles[i] = vectors[2 * i];
        memcpy(&op->floats[i], &vectors[2 * i], 4);
    }
    uintptr_t low = (uintptr_t)regs, high = low + (1 << 20);
    int count = 0;
    // Arguments end with the addresses of two variables that are zero: size and executor.
    for (; count < MOST_ARGUMENTS; count++) {
        int64_t *a = (int64_t *)(count < 6 ? regs[count] : stack[count - 6]);
        int64_t *b = (int64_t *)(count + 1 < 6 ? regs[count + 1] : stack[count - 5]);
        int inside = (uintptr_t)a > low && (uintptr_t)a < high && (uintptr_t)b > low &&
                     (uintptr_t)b < high && !((uintptr_t)a & 7) && !((uintptr_t)b & 7);
        if (inside && a != b && !*a && !*b) {
            if (strstr(sim_names[index], "GetMaxWorkspaceSize")) { *a = 512; *b = (int64_t)op; }
            else { *a = 0; *b = (int64_t)op; }
            break;
        }
        Arg *arg = &op->args[count];
        arg->value = (int64_t)a;
        if (is_obj(a)) { arg->is_obj = 1; arg->obj = copy_obj((Obj *)a); }
        else if ((uintptr_t)a > 65536) {
            struct iovec here = {arg->text, 31}, there = {a, 31};
            if (process_vm_readv(getpid(), &here, 1, &there, 1, 0) < 1) arg->text[0] = 0;
        }
    }
    op->count = count;
    if (count == MOST_ARGUMENTS) return fail(RT_UNSUPPORTED, sim_names[index]);
    return 0;
}
int sim_launch(void *workspace, uint64_t size, Op *op, Stream *stream) {
    (void)workspace; (void)size;
    return submit(stream, (Task){.kind = OP, .op = op});
}
int aclDestroyAclOpExecutor(void *op) { (void)op; return 0; }

// ---- memory ----

static size_t in_use;
static const size_t NOTE = 512;
static size_t capacity(void) { return (size_t)number("SIM_HBM_MIB", 2048) << 20; }
static void *take(size_t size) {
    char *raw = aligned_alloc(NOTE, NOTE + ((size + NOTE - 1) / NOTE) * NOTE);
    memcpy(raw, &size, sizeof size);
    memset(raw + NOTE, 0xFF, size);  // NaN in every float dtype
    return raw + NOTE;
}
aclError aclrtMalloc(void **p, size_t size, aclrtMemMallocPolicy policy) {
    (void)policy;
    pthread_mutex_lock(&lock);
    int fits = in_use + size <= capacity();
    if (fits) in_use += size;
    pthread_mutex_unlock(&lock);
    if (!fits) return fail(RT_NO_MEMORY, "device memory exhausted");
    *p = take(size);
    return 0;
}
aclError aclrtMallocAlign32(void **p, size_t size, aclrtMemMallocPolicy policy) {
    return aclrtMalloc(p, size, policy);
}
aclError aclrtFree(void *p) {
    size_t size;
    memcpy(&size, (char *)p - NOTE, sizeof size);
    int code = until(all_done, NULL, NULL);
    in_use -= size;
    free((char *)p - NOTE);
    return code;
}
aclError aclrtMallocHost(void **p, size_t size) { *p = take(size); return 0; }
aclError aclrtFreeHost(void *p) { free((char *)p - NOTE); return 0; }
aclError aclrtGetMemInfo(aclrtMemAttr attr, size_t *free_bytes, size_t *total) {
    (void)attr;
    *total = capacity();
    *free_bytes = *total - in_use;
    return 0;
}
aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t n, aclrtMemcpyKind kind) {
    (void)room; (void)kind;
    if (captures) { illegal(NULL, ""); return fail(RT_CAPTURE_COPY, "a synchronous copy in a capture"); }
    int code = until(all_done, NULL, NULL);
    memmove(to, from, n);
    return code;
}
aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t n, aclrtMemcpyKind kind,
                          aclrtStream stream) {
    (void)room; (void)kind;
    return submit(stream, (Task){.kind = COPY, .to = to, .from = from, .bytes = n});
}
aclError aclrtMemset(void *to, size_t room, int32_t value, size_t n) {
    (void)room;
    int code = until(all_done, NULL, NULL);
    memset(to, value, n);
    return code;
}
aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t n, aclrtStream stream) {
    (void)room;
    return submit(stream, (Task){.kind = SET, .to = to, .byte = value, .bytes = n});
}

// ---- device, streams, events ----

static int device;
aclError aclInit(const char *path) {
    (void)path;
    fprintf(stderr, "simulated CANN runtime: nothing here shows what a device does\n");
    choose_schedule();
    return 0;
}
aclError aclrtGetDeviceCount(uint32_t *count) { *count = number("SIM_DEVICES", 1); return 0; }
aclError aclrtSetDevice(int32_t id) {
    if (id < 0 || id >= number("SIM_DEVICES", 1)) return fail(RT_INVALID_DEVICE, "invalid device");
    device = id;
    return 0;
}
aclError aclrtGetDevice(int32_t *id) { *id = device; return 0; }
aclError aclrtGetCurrentContext(aclrtContext *context) { *context = &device; return 0; }
aclError aclrtGetPrimaryCtxState(int32_t id, uint32_t *flags, int32_t *active) {
    (void)id;
    if (flags) *flags = 0;
    *active = 1;
    return 0;
}
const char *aclrtGetSocName() {
    const char *name = getenv("SIM_SOC");
    return name ? name : "Ascend910B1";
}
aclError aclrtGetDeviceInfo(uint32_t id, aclrtDevAttr attr, int64_t *value) {
    (void)id; (void)attr;
    *value = 24;
    return 0;
}
aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) { (void)option; *value = 0; return 0; }
aclError aclsysGetCANNVersion(aclCANNPackageName name, aclCANNPackageVersion *version) {
    (void)name;
    memset(version, 0, sizeof *version);
    strcpy(version->version, "8.5.0");
    return 0;
}
aclError aclsysGetVersionStr(char *name, char *version) { (void)name; strcpy(version, "8.5.0"); return 0; }

aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flag) {
    (void)priority; (void)flag;
    choose_schedule();
    pthread_mutex_lock(&lock);
    Stream *s = calloc(1, sizeof(Stream));
    s->id = stream_count++;
    s->next = streams;
    streams = s;
    if (schedule == 3 && !worker_made) {
        pthread_t thread;
        worker_made = !pthread_create(&thread, NULL, work, NULL);
    }
    pthread_mutex_unlock(&lock);
    *stream = s;
    return 0;
}
aclError aclrtCreateStream(aclrtStream *stream) { return aclrtCreateStreamWithConfig(stream, 0, 0); }
aclError aclrtDestroyStream(aclrtStream stream) { return until(stream_done, stream, stream); }
aclError aclrtStreamGetId(aclrtStream stream, int32_t *id) { *id = ((Stream *)stream)->id; return 0; }
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout) {
    (void)timeout;
    Stream *s = stream;
    if (s->capture) return illegal(s->capture, "a stream is synchronised while it is captured");
    return until(stream_done, s, s);
}
aclError aclrtSynchronizeStream(aclrtStream stream) { return aclrtSynchronizeStreamWithTimeout(stream, -1); }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) {
    (void)timeout;
    if (captures) return illegal(NULL, "the device is synchronised while a stream is captured");
    return until(all_done, NULL, NULL);
}
aclError aclrtSynchronizeDevice() { return aclrtSynchronizeDeviceWithTimeout(-1); }
aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status) {
    Stream *s = stream;
    if (s->capture) return illegal(s->capture, "a stream is queried while it is captured");
    *status = pending(s) ? ACL_STREAM_STATUS_NOT_READY : ACL_STREAM_STATUS_COMPLETE;
    return 0;
}
aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag) {
    (void)flag;
    *event = calloc(1, sizeof(Event));
    return 0;
}
aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag) { return aclrtCreateEventExWithFlag(event, flag); }
aclError aclrtDestroyEvent(aclrtEvent event) { (void)event; return 0; }  // tasks may still name it
aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
    Event *e = event;
    Stream *s = stream;
    if (s->capture) { e->graph = s->capture; e->forked = !s->origin; if (!s->origin) s->capture->streams--; return 0; }
    e->graph = NULL;
    return submit(s, (Task){.kind = RECORD, .event = e, .sequence = ++e->issued});
}
aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream) { (void)event; (void)stream; return 0; }
aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
    Event *e = event;
    Stream *s = stream;
    if (e->graph) {  // recorded in a capture: this stream joins it
        if (!s->capture) { s->capture = e->graph; s->origin = 0; e->graph->streams++; }
        return 0;
    }
    if (s->capture || !e->issued) return 0;
    return submit(s, (Task){.kind = WAIT, .event = e, .sequence = e->issued});
}
aclError aclrtSynchronizeEvent(aclrtEvent event) {
    Event *e = event;
    if (e->graph && captures) return illegal(e->graph, "an event of a capture is waited for");
    return until(event_done, e, NULL);
}
aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
    Event *e = event;
    if (e->graph && captures) return illegal(e->graph, "an event of a capture is queried");
    if (schedule != 3) {  // somebody who asks again and again must see it happen
        pthread_mutex_lock(&lock);
        if (!event_done(e)) step_any(NULL);
        pthread_mutex_unlock(&lock);
    }
    *status = event_done(e) ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    return 0;
}
aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status) {
    aclrtEventRecordedStatus recorded;
    int code = aclrtQueryEventStatus(event, &recorded);
    *status = recorded == ACL_EVENT_RECORDED_STATUS_COMPLETE ? ACL_EVENT_WAIT_STATUS_COMPLETE
                                                             : ACL_EVENT_WAIT_STATUS_NOT_READY;
    return code;
}
aclError aclrtValueWait(void *address, uint64_t value, uint32_t flag, aclrtStream stream) {
    return submit(stream, (Task){.kind = VALUE_WAIT, .address = address, .value = value, .flag = flag});
}
aclError aclrtValueWrite(void *address, uint64_t value, uint32_t flag, aclrtStream stream) {
    return submit(stream, (Task){.kind = VALUE_WRITE, .address = address, .value = value, .flag = flag});
}
aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void *argument) {
    return submit(stream, (Task){.kind = HOST, .call = function, .argument = argument});
}

// ---- capture ----

aclError aclmdlRICaptureBegin(aclrtStream stream, aclmdlRICaptureMode mode) {
    if (live_graphs >= number("SIM_MAX_GRAPHS", 2000))
        return fail(RT_NO_STREAM, "stream resource is not enough");
    Stream *s = stream;
    s->capture = calloc(1, sizeof(Graph));
    s->capture->mode = mode;
    s->origin = 1;
    captures++;
    return 0;
}
aclError aclmdlRICaptureEnd(aclrtStream stream, aclmdlRI *made) {
    Graph *graph = ((Stream *)stream)->capture;
    if (!graph) return fail(RT_CAPTURE_BROKEN, "nothing is captured");
    int left = graph->streams;
    for (Stream *s = streams; s; s = s->next) if (s->capture == graph) s->capture = NULL;
    captures--;
    *made = NULL;
    if (graph->broken) return fail(RT_CAPTURE_BROKEN, "the capture was invalidated");
    if (left > 0) return fail(RT_UNJOINED, "a stream of the capture was not joined");
    live_graphs++;
    *made = graph;
    return 0;
}
aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus *status, aclmdlRI *graph) {
    Stream *s = stream;
    *status = s && s->capture ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
    if (graph) *graph = s ? s->capture : NULL;
    return 0;
}
aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *mode) {
    static __thread aclmdlRICaptureMode mine;
    aclmdlRICaptureMode before = mine;
    mine = *mode;
    *mode = before;
    return 0;
}
aclError aclmdlRICaptureTaskGrpBegin(aclrtStream stream) {
    Stream *s = stream;
    if (!s->capture) return fail(RT_CAPTURE_ILLEGAL, "a task group without a capture");
    s->open = calloc(1, sizeof(Group));
    *s->open = (Group){.graph = s->capture, .first = s->capture->tasks.count};
    return 0;
}
aclError aclmdlRICaptureTaskGrpEnd(aclrtStream stream, aclrtTaskGrp *handle) {
    Stream *s = stream;
    s->open->count = s->capture->tasks.count - s->open->first;
    *handle = s->open;
    s->open = NULL;
    return 0;
}
aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream stream, aclrtTaskGrp handle) {
    Stream *s = stream;
    s->updating = handle;
    s->fresh = (Tasks){0};
    return 0;
}
aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream stream) {
    Stream *s = stream;
    Group *group = s->updating;
    Tasks fresh = s->fresh;
    s->updating = NULL;
    int same = fresh.count == group->count;
    for (size_t i = 0; same && i < fresh.count; i++) {
        Task *old = &group->graph->tasks.items[group->first + i];
        same = old->kind == OP && old->op->index == fresh.items[i].op->index;
    }
    if (!same) return fail(RT_UPDATE_MISMATCH, "an update has other tasks than its group");
    return submit(s, (Task){.kind = UPDATE, .group = group, .fresh = fresh.items, .fresh_count = fresh.count});
}
aclError aclmdlRIExecuteAsync(aclmdlRI graph, aclrtStream stream) {
    return submit(stream, (Task){.kind = LAUNCH, .graph = graph});
}
aclError aclmdlRIDestroy(aclmdlRI graph) {
    (void)graph;  // tasks may still name it
    live_graphs--;
    return until(all_done, NULL, NULL);
}
