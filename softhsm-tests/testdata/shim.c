// A PKCS#11 module that forwards to SoftHSM and goes wrong as a script says. Environment:
//
//   SHIM_DIR     a folder: each process that loads the shim takes the first number that is free there, from 0
//   SHIM_DELAY   microseconds that each call takes longer, without using the CPU: a device behind a network
//   SHIM_SCRIPT  a file with a line for each fault: FROM TO PROCESS FUNCTION FAULT ARGUMENT COUNT SKIP. It is read again
//                when another file was renamed to it
//   SHIM_LOG     a file that gets a line for each call that ends: FUNCTION SESSION RETURN-VALUE
//   SHIM_MAKER, SHIM_VERSION  CK_INFO.manufacturerID and libraryVersion, MAJOR.MINOR
//   SHIM_MOST    CK_TOKEN_INFO.ulMaxSessionCount and ulMaxRwSessionCount, with a space between
//   SHIM_DIALECT in what the module differs from SoftHSM, words with commas between. montgomery: X25519 keys are
//                CKK_EC_MONTGOMERY, made by CKM_EC_MONTGOMERY_KEY_PAIR_GEN, and not otherwise. params-oid, params-name:
//                CKA_EC_PARAMS is taken in this form only, but for P-256's. reads-oid: and is returned as an OID. point-raw: CKA_EC_POINT
//                is written and read without DER. point-bits: it is read as a BIT STRING. no-eddsa: CKM_EDDSA is
//                lacking. no-allowed: CKA_ALLOWED_MECHANISMS is refused
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
static int speaks(const char *word);

static CK_RV sign_init(CK_ULONG session, CK_MECHANISM *mechanism, CK_ULONG key) {
	ENTER(SIGN_INIT, session);
	if (mechanism->mechanism == CKM_EDDSA && speaks("no-eddsa")) return ended(SIGN_INIT, session, CKR_MECHANISM_INVALID);
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

// The rest is the dialects. speaks reports whether a word is among those of SHIM_DIALECT.
static int speaks(const char *word) {
	const char *all = getenv("SHIM_DIALECT");
	for (const char *at = all; at != NULL && *at != 0; at = strchr(at, ','), at += at != NULL) {
		size_t length = strcspn(at, ",");
		if (length == strlen(word) && !strncmp(at, word, length)) return 1;
	}
	return 0;
}

// The curves, as a DER object identifier and as a DER PrintableString.
static const struct curve { const char *oid, *name; } curves[] = {
	{ "\x06\x03\x2b\x65\x70", "\x13\x0c" "edwards25519" },
	{ "\x06\x03\x2b\x65\x6e", "\x13\x0a" "curve25519" },
	{ "\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07", "\x13\x09" "secp256r1" },
};

static int is(const CK_ATTRIBUTE *a, const char *text) { return a->length == strlen(text) && !memcmp(a->value, text, a->length); }

// into writes a template as SoftHSM wants it. space has room for one CKA_EC_POINT.
static CK_RV into(const CK_ATTRIBUTE *from, CK_ULONG count, CK_ATTRIBUTE *to, unsigned char *space, int x25519) {
	static CK_ULONG edwards = CKK_EC_EDWARDS;
	for (CK_ULONG i = 0; i < count; i++) {
		CK_ATTRIBUTE *a = &to[i];
		*a = from[i];
		if (a->type == CKA_ALLOWED_MECHANISMS && speaks("no-allowed")) return CKR_ATTRIBUTE_TYPE_INVALID;
		if (a->type == CKA_KEY_TYPE && speaks("montgomery") && (*(CK_ULONG *)a->value == CKK_EC_MONTGOMERY) != x25519) return CKR_TEMPLATE_INCONSISTENT;
		if (a->type == CKA_KEY_TYPE && speaks("montgomery") && x25519) a->value = &edwards;
		if (a->type == CKA_EC_PARAMS) {
			int oid = ((unsigned char *)a->value)[0] == 0x06;
			if (oid ? speaks("params-name") && !is(a, curves[2].oid) : speaks("params-oid")) return CKR_CURVE_NOT_SUPPORTED;
			if (speaks("montgomery") && (is(a, curves[1].oid) || is(a, curves[1].name)) != x25519) return CKR_CURVE_NOT_SUPPORTED;
		}
		if (a->type == CKA_EC_POINT && speaks("point-raw")) {
			if (a->length != 32) return CKR_ATTRIBUTE_VALUE_INVALID;
			space[0] = 0x04, space[1] = 32;
			memcpy(space + 2, a->value, 32);
			a->value = space, a->length = 34;
		}
	}
	return CKR_OK;
}

static CK_RV create_object(CK_ULONG session, CK_ATTRIBUTE *template, CK_ULONG count, CK_ULONG *object) {
	ENTER(CREATE_OBJECT, session);
	CK_ATTRIBUTE to[64];
	unsigned char space[64];
	CK_RV rv = into(template, count, to, space, 0);
	return ended(CREATE_OBJECT, session, rv != CKR_OK ? rv : real->function[CREATE_OBJECT](session, to, count, object));
}

static CK_RV generate_key_pair(CK_ULONG session, CK_MECHANISM *mechanism, CK_ATTRIBUTE *public, CK_ULONG n_public, CK_ATTRIBUTE *private,
		CK_ULONG n_private, CK_ULONG *public_key, CK_ULONG *private_key) {
	ENTER(GENERATE_KEY_PAIR, session);
	CK_ATTRIBUTE to_public[64], to_private[64];
	unsigned char space[64];
	CK_MECHANISM m = *mechanism;
	int x25519 = speaks("montgomery") && m.mechanism == CKM_EC_MONTGOMERY_KEY_PAIR_GEN;
	if (x25519) m.mechanism = CKM_EC_EDWARDS_KEY_PAIR_GEN;
	CK_RV rv = into(public, n_public, to_public, space, x25519);
	if (rv == CKR_OK) rv = into(private, n_private, to_private, space, x25519);
	if (rv == CKR_OK) rv = real->function[GENERATE_KEY_PAIR](session, &m, to_public, n_public, to_private, n_private, public_key, private_key);
	return ended(GENERATE_KEY_PAIR, session, rv);
}

// give returns a value as C_GetAttributeValue and others do: its length alone where there is no buffer.
static CK_RV give(const void *value, CK_ULONG length, void *buffer, CK_ULONG *size, CK_ULONG unit) {
	CK_ULONG room = *size;
	*size = length;
	if (buffer == NULL) return CKR_OK;
	if (room < length) return CKR_BUFFER_TOO_SMALL;
	memcpy(buffer, value, length * unit);
	return CKR_OK;
}

// read_attribute reads one attribute as the dialect has it.
static CK_RV read_attribute(CK_ULONG session, CK_ULONG object, CK_ATTRIBUTE *a) {
	unsigned char value[256];
	CK_ATTRIBUTE is_there = { a->type, value + 1, sizeof value - 1 };
	if (a->type != CKA_EC_PARAMS && a->type != CKA_EC_POINT) return real->function[GET_ATTRIBUTE_VALUE](session, object, a, 1UL);
	CK_RV rv = real->function[GET_ATTRIBUTE_VALUE](session, object, &is_there, 1UL);
	if (rv != CKR_OK) return rv;
	for (int i = 0; a->type == CKA_EC_PARAMS && speaks("reads-oid") && i < 3; i++)
		if (is(&is_there, curves[i].name)) return give(curves[i].oid, strlen(curves[i].oid), a->value, &a->length, 1);
	if (a->type == CKA_EC_POINT && speaks("point-raw")) return give(value + 3, is_there.length - 2, a->value, &a->length, 1);
	if (a->type == CKA_EC_POINT && speaks("point-bits")) { // the length is short enough for one byte
		value[0] = 0x03, value[1] = value[2] + 1, value[2] = 0;
		return give(value, is_there.length + 1, a->value, &a->length, 1);
	}
	return give(value + 1, is_there.length, a->value, &a->length, 1);
}

static CK_RV get_attribute_value(CK_ULONG session, CK_ULONG object, CK_ATTRIBUTE *template, CK_ULONG count) {
	ENTER(GET_ATTRIBUTE_VALUE, session);
	CK_RV rv = CKR_OK;
	for (CK_ULONG i = 0; i < count; i++) {
		CK_RV one = read_attribute(session, object, &template[i]);
		if (rv == CKR_OK) rv = one;
	}
	return ended(GET_ATTRIBUTE_VALUE, session, rv);
}

static CK_RV get_info(CK_INFO *info) {
	ENTER(GET_INFO, 0UL);
	CK_RV rv = real->function[GET_INFO](info);
	const char *maker = getenv("SHIM_MAKER"), *version = getenv("SHIM_VERSION");
	if (rv == CKR_OK && maker != NULL) {
		memset(info->maker, ' ', sizeof info->maker);
		memcpy(info->maker, maker, strnlen(maker, sizeof info->maker));
	}
	if (rv == CKR_OK && version != NULL) sscanf(version, "%hhu.%hhu", &info->version[0], &info->version[1]);
	return ended(GET_INFO, 0, rv);
}

static CK_RV get_token_info(CK_ULONG slot, CK_TOKEN_INFO *info) {
	ENTER(GET_TOKEN_INFO, 0UL);
	CK_RV rv = real->function[GET_TOKEN_INFO](slot, info);
	const char *most = getenv("SHIM_MOST");
	if (rv == CKR_OK && most != NULL) sscanf(most, "%lu %lu", &info->most, &info->most_rw);
	return ended(GET_TOKEN_INFO, 0, rv);
}

static CK_RV get_mechanism_list(CK_ULONG slot, CK_ULONG *list, CK_ULONG *count) {
	ENTER(GET_MECHANISM_LIST, 0UL);
	CK_ULONG all[256], n = 255, kept = 0;
	CK_RV rv = real->function[GET_MECHANISM_LIST](slot, all, &n);
	if (rv != CKR_OK) return ended(GET_MECHANISM_LIST, 0, rv);
	for (CK_ULONG i = 0; i < n; i++)
		if (all[i] != CKM_EDDSA || !speaks("no-eddsa")) all[kept++] = all[i];
	if (speaks("montgomery")) all[kept++] = CKM_EC_MONTGOMERY_KEY_PAIR_GEN;
	return ended(GET_MECHANISM_LIST, 0, give(all, kept, list, count, sizeof *all));
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST **list) {
	load();
	ours = *real;
	ours.function[INITIALIZE] = (CK_FUNCTION)initialize;
	ours.function[FINALIZE] = (CK_FUNCTION)finalize;
	ours.function[GET_INFO] = (CK_FUNCTION)get_info;
	ours.function[GET_SLOT_LIST] = (CK_FUNCTION)get_slot_list;
	ours.function[GET_TOKEN_INFO] = (CK_FUNCTION)get_token_info;
	ours.function[GET_MECHANISM_LIST] = (CK_FUNCTION)get_mechanism_list;
	ours.function[OPEN_SESSION] = (CK_FUNCTION)open_session;
	ours.function[CLOSE_SESSION] = (CK_FUNCTION)close_session;
	ours.function[GET_SESSION_INFO] = (CK_FUNCTION)get_session_info;
	ours.function[LOGIN] = (CK_FUNCTION)login;
	ours.function[CREATE_OBJECT] = (CK_FUNCTION)create_object;
	ours.function[FIND_OBJECTS_INIT] = (CK_FUNCTION)find_objects_init;
	ours.function[FIND_OBJECTS] = (CK_FUNCTION)find_objects;
	ours.function[GET_ATTRIBUTE_VALUE] = (CK_FUNCTION)get_attribute_value;
	ours.function[SIGN_INIT] = (CK_FUNCTION)sign_init;
	ours.function[SIGN] = (CK_FUNCTION)sign;
	ours.function[GENERATE_KEY_PAIR] = (CK_FUNCTION)generate_key_pair;
	ours.function[DERIVE_KEY] = (CK_FUNCTION)derive_key;
	*list = &ours;
	return CKR_OK;
}
