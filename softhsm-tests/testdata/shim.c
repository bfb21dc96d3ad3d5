// A PKCS#11 module that forwards to SoftHSM and goes wrong as a script says. Environment:
//
//   SHIM_DIR     a folder: each process that loads the shim takes the first number that is free there, from 0
//   SHIM_DELAY   microseconds that each call takes longer, without using the CPU: a device behind a network
//   SHIM_SCRIPT  a file with a line for each fault: FROM TO PROCESS FUNCTION FAULT ARGUMENT COUNT SKIP. It is read again
//                when another file was renamed to it
//   SHIM_LOG     a file that gets a line for each call that ends: FUNCTION SESSION RETURN-VALUE
//
// FROM and TO are milliseconds since the epoch, PROCESS a number or -1 for all, FUNCTION an index in CK_FUNCTION_LIST or
// -1, COUNT how many calls it hits, or 0 for all in its time, SKIP how many it lets go before. Faults: code (the return
// value ARGUMENT), hang, held (until the script has no such line any more, and then ARGUMENT; the log has a line with the
// value -1 meanwhile), slow (ARGUMENT milliseconds), crash, wrong (one bit of the output), short (one byte less), logout
// (behind the caller's back), gone (the device), limit (to ARGUMENT sessions), lost (all objects).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "pkcs11.h"

static CK_FUNCTION_LIST *real, ours;
static int process = -1, log_file = -1;
static useconds_t delay;
static atomic_int sessions;
static int *volatile nowhere;

static struct fault {
	long long from, to;
	int process, function;
	char kind[16];
	unsigned long argument;
	int count, skip, hits;
} faults[4096];
static int n;
static const char *script;
static struct stat seen;
static pthread_mutex_t reading = PTHREAD_MUTEX_INITIALIZER;

// read_script reads the script where it is another file than the last time. The caller holds reading.
static void read_script(void) {
	struct stat now;
	if (script == NULL || stat(script, &now) != 0 || now.st_ino == seen.st_ino && !memcmp(&now.st_mtim, &seen.st_mtim, sizeof now.st_mtim)) return;
	FILE *file = fopen(script, "r");
	if (file == NULL) return;
	seen = now;
	for (n = 0; n < 4096; n++) {
		struct fault *f = &faults[n];
		if (fscanf(file, "%lld %lld %d %d %15s %lu %d %d", &f->from, &f->to, &f->process, &f->function, f->kind, &f->argument, &f->count, &f->skip) != 8) break;
		f->hits = 0;
	}
	fclose(file);
}

static void load(void) {
	if (real != NULL) return;
	void *module = dlopen("/usr/lib/softhsm/libsofthsm2.so", RTLD_NOW);
	CK_RV (*get)(CK_FUNCTION_LIST **) = module ? dlsym(module, "C_GetFunctionList") : NULL;
	if (get == NULL || get(&real) != CKR_OK) _exit(70);
	const char *dir = getenv("SHIM_DIR"), *wait = getenv("SHIM_DELAY"), *path = getenv("SHIM_LOG");
	if ((script = getenv("SHIM_SCRIPT")) != NULL) script = strdup(script);
	if (path != NULL) log_file = open(path, O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0600);
	if (wait != NULL) delay = atoi(wait);
	for (int i = 0; dir != NULL && process < 0 && i < 64; i++) {
		char path[4096];
		snprintf(path, sizeof path, "%s/process.%d", dir, i);
		int fd = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
		if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0) process = i; // until the process ends
		else close(fd);
	}
}

// ended writes a call into the log, and returns what it returned.
static CK_RV ended(int function, CK_ULONG session, CK_RV rv) {
	if (log_file >= 0) dprintf(log_file, "%d %lu %ld\n", function, session, (long)rv);
	return rv;
}

// due returns the fault of a kind that a call meets now, or NULL. kind NULL stands for those that any call can meet. What
// it returns is the thread's, until the next time.
static struct fault *due(int function, const char *kind) {
	static _Thread_local struct fault met;
	struct fault *found = NULL;
	struct timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	long long now = t.tv_sec * 1000LL + t.tv_nsec / 1000000;
	pthread_mutex_lock(&reading);
	read_script();
	for (int i = 0; i < n && found == NULL; i++) {
		struct fault *f = &faults[i];
		if (now < f->from || now >= f->to || f->process >= 0 && f->process != process || f->function >= 0 && f->function != function) continue;
		if (kind != NULL ? strcmp(f->kind, kind) : !strcmp(f->kind, "wrong") || !strcmp(f->kind, "short") || !strcmp(f->kind, "logout") ||
				!strcmp(f->kind, "limit") || !strcmp(f->kind, "lost")) continue;
		if (f->count > 0 && f->hits == f->skip + f->count || f->hits++ < f->skip) continue;
		met = *f;
		found = &met;
	}
	pthread_mutex_unlock(&reading);
	return found;
}

// held waits until the script has no line of this kind any more.
static void held(int function, CK_ULONG session) {
	ended(function, session, (CK_RV)-1);
	for (int there = 1; there; usleep(1000)) {
		there = 0;
		pthread_mutex_lock(&reading);
		read_script();
		for (int i = 0; i < n; i++) there |= !strcmp(faults[i].kind, "held");
		pthread_mutex_unlock(&reading);
	}
}

// before is what happens to every call: it may not return, or return an error.
static CK_RV before(int function, CK_ULONG session) {
	if (delay) usleep(delay);
	struct fault *f = due(function, NULL);
	if (f == NULL) return CKR_OK;
	CK_RV code = f->argument;
	if (!strcmp(f->kind, "code")) return code;
	if (!strcmp(f->kind, "held")) {
		held(function, session);
		return code;
	}
	if (!strcmp(f->kind, "gone")) return CKR_DEVICE_REMOVED;
	if (!strcmp(f->kind, "slow")) usleep(f->argument * 1000);
	if (!strcmp(f->kind, "hang")) for (;;) pause();
	if (!strcmp(f->kind, "crash")) *nowhere = 0;
	return CKR_OK;
}

#define ENTER(function, session) do { CK_RV rv = before(function, session); if (rv != CKR_OK) return ended(function, session, rv); } while (0)

static CK_RV initialize(void *arguments) {
	ENTER(INITIALIZE, 0UL);
	atomic_store(&sessions, 0);
	return ended(INITIALIZE, 0, real->function[INITIALIZE](arguments));
}
static CK_RV finalize(void *reserved) {
	ENTER(FINALIZE, 0UL);
	return ended(FINALIZE, 0, real->function[FINALIZE](reserved));
}
static CK_RV get_slot_list(unsigned char present, CK_ULONG *list, CK_ULONG *count) {
	ENTER(GET_SLOT_LIST, 0UL);
	return real->function[GET_SLOT_LIST](present, list, count);
}
static CK_RV get_token_info(CK_ULONG slot, void *info) {
	ENTER(GET_TOKEN_INFO, 0UL);
	return real->function[GET_TOKEN_INFO](slot, info);
}
static CK_RV open_session(CK_ULONG slot, CK_ULONG flags, void *application, void *notify, CK_ULONG *session) {
	ENTER(OPEN_SESSION, 0UL);
	struct fault *f = due(OPEN_SESSION, "limit");
	if (f != NULL && atomic_load(&sessions) >= (int)f->argument) return ended(OPEN_SESSION, 0, CKR_SESSION_COUNT);
	CK_RV rv = real->function[OPEN_SESSION](slot, flags, application, notify, session);
	if (rv == CKR_OK) atomic_fetch_add(&sessions, 1);
	return ended(OPEN_SESSION, rv == CKR_OK ? *session : 0, rv);
}
static CK_RV close_session(CK_ULONG session) {
	ENTER(CLOSE_SESSION, session);
	CK_RV rv = real->function[CLOSE_SESSION](session);
	if (rv == CKR_OK) atomic_fetch_sub(&sessions, 1);
	return ended(CLOSE_SESSION, session, rv);
}
static CK_RV get_session_info(CK_ULONG session, void *info) {
	ENTER(GET_SESSION_INFO, session);
	return ended(GET_SESSION_INFO, session, real->function[GET_SESSION_INFO](session, info));
}
static CK_RV login(CK_ULONG session, CK_ULONG user, void *pin, CK_ULONG length) {
	ENTER(LOGIN, session);
	return ended(LOGIN, session, real->function[LOGIN](session, user, pin, length));
}
static CK_RV find_objects_init(CK_ULONG session, void *template, CK_ULONG count) {
	ENTER(FIND_OBJECTS_INIT, session);
	return real->function[FIND_OBJECTS_INIT](session, template, count);
}
static CK_RV find_objects(CK_ULONG session, CK_ULONG *objects, CK_ULONG most, CK_ULONG *count) {
	ENTER(FIND_OBJECTS, session);
	CK_RV rv = real->function[FIND_OBJECTS](session, objects, most, count);
	if (due(FIND_OBJECTS, "lost")) *count = 0;
	return rv;
}
static CK_RV get_attribute_value(CK_ULONG session, CK_ULONG object, CK_ATTRIBUTE *template, CK_ULONG count) {
	ENTER(GET_ATTRIBUTE_VALUE, session);
	return real->function[GET_ATTRIBUTE_VALUE](session, object, template, count);
}
static CK_RV sign_init(CK_ULONG session, void *mechanism, CK_ULONG key) {
	ENTER(SIGN_INIT, session);
	if (due(SIGN_INIT, "logout")) real->function[LOGOUT](session);
	if (due(SIGN_INIT, "lost")) return ended(SIGN_INIT, session, CKR_KEY_HANDLE_INVALID);
	return ended(SIGN_INIT, session, real->function[SIGN_INIT](session, mechanism, key));
}
static CK_RV sign(CK_ULONG session, void *data, CK_ULONG length, unsigned char *signature, CK_ULONG *size) {
	ENTER(SIGN, session);
	CK_RV rv = real->function[SIGN](session, data, length, signature, size);
	if (rv == CKR_OK && signature != NULL && *size > 0) {
		if (due(SIGN, "wrong")) signature[*size / 2] ^= 4;
		if (due(SIGN, "short")) --*size;
	}
	return ended(SIGN, session, rv);
}
static CK_RV derive_key(CK_ULONG session, void *mechanism, CK_ULONG key, void *template, CK_ULONG count, CK_ULONG *object) {
	ENTER(DERIVE_KEY, session);
	if (due(DERIVE_KEY, "logout")) real->function[LOGOUT](session);
	if (due(DERIVE_KEY, "lost")) return ended(DERIVE_KEY, session, CKR_KEY_HANDLE_INVALID);
	return ended(DERIVE_KEY, session, real->function[DERIVE_KEY](session, mechanism, key, template, count, object));
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST **list) {
	load();
	ours = *real;
	ours.function[INITIALIZE] = (CK_FUNCTION)initialize;
	ours.function[FINALIZE] = (CK_FUNCTION)finalize;
	ours.function[GET_SLOT_LIST] = (CK_FUNCTION)get_slot_list;
	ours.function[GET_TOKEN_INFO] = (CK_FUNCTION)get_token_info;
	ours.function[OPEN_SESSION] = (CK_FUNCTION)open_session;
	ours.function[CLOSE_SESSION] = (CK_FUNCTION)close_session;
	ours.function[GET_SESSION_INFO] = (CK_FUNCTION)get_session_info;
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
