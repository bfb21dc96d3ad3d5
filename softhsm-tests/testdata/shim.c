// A PKCS#11 module that forwards to SoftHSM and goes wrong as a script says. Environment:
//
//   SHIM_DIR     a folder: each process that loads the shim takes the first number that is free there, from 0
//   SHIM_DELAY   microseconds that each call takes longer, without using the CPU: a device behind a network
//   SHIM_SCRIPT  a file with a line for each fault: FROM TO PROCESS FUNCTION FAULT ARGUMENT COUNT
//
// FROM and TO are milliseconds since the epoch, PROCESS a number or -1 for all, FUNCTION an index in CK_FUNCTION_LIST or
// -1, COUNT how many calls it hits, or 0 for all in its time. Faults: code (the return value ARGUMENT), hang, slow
// (ARGUMENT milliseconds), crash, wrong (one bit of the output), short (one byte less), logout (behind the caller's back),
// gone (the device), limit (to ARGUMENT sessions), lost (all objects).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>
#include "pkcs11.h"

static CK_FUNCTION_LIST *real, ours;
static int process = -1;
static useconds_t delay;
static atomic_int sessions;
static int *volatile nowhere;

static struct fault {
	long long from, to;
	int process, function;
	char kind[16];
	unsigned long argument;
	int count;
	atomic_int hits;
} faults[4096];
static int n;

static void load(void) {
	if (real != NULL) return;
	void *module = dlopen("/usr/lib/softhsm/libsofthsm2.so", RTLD_NOW);
	CK_RV (*get)(CK_FUNCTION_LIST **) = module ? dlsym(module, "C_GetFunctionList") : NULL;
	if (get == NULL || get(&real) != CKR_OK) _exit(70);
	const char *dir = getenv("SHIM_DIR"), *wait = getenv("SHIM_DELAY"), *script = getenv("SHIM_SCRIPT");
	if (wait != NULL) delay = atoi(wait);
	for (int i = 0; dir != NULL && process < 0 && i < 64; i++) {
		char path[4096];
		snprintf(path, sizeof path, "%s/process.%d", dir, i);
		int fd = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
		if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0) process = i; // until the process ends
		else close(fd);
	}
	FILE *file = script ? fopen(script, "r") : NULL;
	if (file == NULL) return;
	while (n < 4096) {
		struct fault *f = &faults[n];
		if (fscanf(file, "%lld %lld %d %d %15s %lu %d", &f->from, &f->to, &f->process, &f->function, f->kind, &f->argument, &f->count) != 7) break;
		n++;
	}
	fclose(file);
}

// due returns the fault of a kind that a call meets now, or NULL. kind NULL stands for those that any call can meet.
static struct fault *due(int function, const char *kind) {
	struct timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	long long now = t.tv_sec * 1000LL + t.tv_nsec / 1000000;
	for (int i = 0; i < n; i++) {
		struct fault *f = &faults[i];
		if (now < f->from || now >= f->to || f->process >= 0 && f->process != process || f->function >= 0 && f->function != function) continue;
		if (kind != NULL ? strcmp(f->kind, kind) : !strcmp(f->kind, "wrong") || !strcmp(f->kind, "short") || !strcmp(f->kind, "logout") ||
				!strcmp(f->kind, "limit") || !strcmp(f->kind, "lost")) continue;
		if (f->count > 0 && atomic_fetch_add(&f->hits, 1) >= f->count) continue;
		return f;
	}
	return NULL;
}

// before is what happens to every call: it may not return, or return an error.
static CK_RV before(int function) {
	if (delay) usleep(delay);
	struct fault *f = due(function, NULL);
	if (f == NULL) return CKR_OK;
	if (!strcmp(f->kind, "code")) return f->argument;
	if (!strcmp(f->kind, "gone")) return CKR_DEVICE_REMOVED;
	if (!strcmp(f->kind, "slow")) usleep(f->argument * 1000);
	if (!strcmp(f->kind, "hang")) for (;;) pause();
	if (!strcmp(f->kind, "crash")) *nowhere = 0;
	return CKR_OK;
}

#define ENTER(function) do { CK_RV rv = before(function); if (rv != CKR_OK) return rv; } while (0)

static CK_RV initialize(void *arguments) {
	ENTER(INITIALIZE);
	atomic_store(&sessions, 0);
	return real->function[INITIALIZE](arguments);
}
static CK_RV get_slot_list(unsigned char present, CK_ULONG *list, CK_ULONG *count) {
	ENTER(GET_SLOT_LIST);
	return real->function[GET_SLOT_LIST](present, list, count);
}
static CK_RV get_token_info(CK_ULONG slot, void *info) {
	ENTER(GET_TOKEN_INFO);
	return real->function[GET_TOKEN_INFO](slot, info);
}
static CK_RV open_session(CK_ULONG slot, CK_ULONG flags, void *application, void *notify, CK_ULONG *session) {
	ENTER(OPEN_SESSION);
	struct fault *f = due(OPEN_SESSION, "limit");
	if (f != NULL && atomic_load(&sessions) >= (int)f->argument) return CKR_SESSION_COUNT;
	CK_RV rv = real->function[OPEN_SESSION](slot, flags, application, notify, session);
	if (rv == CKR_OK) atomic_fetch_add(&sessions, 1);
	return rv;
}
static CK_RV close_session(CK_ULONG session) {
	ENTER(CLOSE_SESSION);
	atomic_fetch_sub(&sessions, 1);
	return real->function[CLOSE_SESSION](session);
}
static CK_RV login(CK_ULONG session, CK_ULONG user, void *pin, CK_ULONG length) {
	ENTER(LOGIN);
	return real->function[LOGIN](session, user, pin, length);
}
static CK_RV find_objects_init(CK_ULONG session, void *template, CK_ULONG count) {
	ENTER(FIND_OBJECTS_INIT);
	return real->function[FIND_OBJECTS_INIT](session, template, count);
}
static CK_RV find_objects(CK_ULONG session, CK_ULONG *objects, CK_ULONG most, CK_ULONG *count) {
	ENTER(FIND_OBJECTS);
	CK_RV rv = real->function[FIND_OBJECTS](session, objects, most, count);
	if (due(FIND_OBJECTS, "lost")) *count = 0;
	return rv;
}
static CK_RV get_attribute_value(CK_ULONG session, CK_ULONG object, CK_ATTRIBUTE *template, CK_ULONG count) {
	ENTER(GET_ATTRIBUTE_VALUE);
	return real->function[GET_ATTRIBUTE_VALUE](session, object, template, count);
}
static CK_RV sign_init(CK_ULONG session, void *mechanism, CK_ULONG key) {
	ENTER(SIGN_INIT);
	if (due(SIGN_INIT, "logout")) real->function[LOGOUT](session);
	if (due(SIGN_INIT, "lost")) return CKR_KEY_HANDLE_INVALID;
	return real->function[SIGN_INIT](session, mechanism, key);
}
static CK_RV sign(CK_ULONG session, void *data, CK_ULONG length, unsigned char *signature, CK_ULONG *size) {
	ENTER(SIGN);
	CK_RV rv = real->function[SIGN](session, data, length, signature, size);
	if (rv == CKR_OK && signature != NULL && *size > 0) {
		if (due(SIGN, "wrong")) signature[*size / 2] ^= 4;
		if (due(SIGN, "short")) --*size;
	}
	return rv;
}
static CK_RV derive_key(CK_ULONG session, void *mechanism, CK_ULONG key, void *template, CK_ULONG count, CK_ULONG *object) {
	ENTER(DERIVE_KEY);
	if (due(DERIVE_KEY, "logout")) real->function[LOGOUT](session);
	if (due(DERIVE_KEY, "lost")) return CKR_KEY_HANDLE_INVALID;
	return real->function[DERIVE_KEY](session, mechanism, key, template, count, object);
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST **list) {
	load();
	ours = *real;
	ours.function[INITIALIZE] = (CK_FUNCTION)initialize;
	ours.function[GET_SLOT_LIST] = (CK_FUNCTION)get_slot_list;
	ours.function[GET_TOKEN_INFO] = (CK_FUNCTION)get_token_info;
	ours.function[OPEN_SESSION] = (CK_FUNCTION)open_session;
	ours.function[CLOSE_SESSION] = (CK_FUNCTION)close_session;
	ours.function[LOGIN] = (CK_FUNCTION)login;
	ours.function[FIND_OBJECTS_INIT] = (CK_FUNCTION)find_objects_init;
	ours.function[FIND_OBJECTS] = (CK_FUNCTION)find_objects;
	ours.function[GET_ATTRIBUTE_VALUE] = (CK_FUNCTION)get_attribute_value;
	ours.function[SIGN_INIT] = (CK_FUNCTION)sign_init;
	ours.function[SIGN] = (CK_FUNCTION)sign;
	ours.function[DERIVE_KEY] = (CK_FUNCTION)derive_key;
	*list = &ours;
	return CKR_OK;
}
