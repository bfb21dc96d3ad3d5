// The loud module forwards to SoftHSM, and misbehaves as a library in its process:
//
//   LOUD_EXIT     if set, the process ends with exit status 0 at C_GetFunctionList
//   LOUD_REFUSES  a variable's name: if the variable is set, the process ends with exit status 1
//
//   LOUD_PIN      if set, C_Login prints its PIN on stderr
//   LOUD_SAYS     if set, a text that the module prints on stderr when it is loaded
//
// The module prints a line on stdout when it is loaded.
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "pkcs11.h"

static const char line[] = "the module prints on stdout\n";

__attribute__((constructor)) static void load(void) {
	if (write(1, line, sizeof line - 1) < 0) _exit(70);
	const char *says = getenv("LOUD_SAYS");
	if (says != NULL && write(2, says, strlen(says)) < 0) _exit(70);
	const char *refused = getenv("LOUD_REFUSES");
	if (refused != NULL && getenv(refused) != NULL) _exit(1);
}

// C_Login, which says its PIN as debug builds of modules do: as it is, in two writes, in hex, in
// base64, and percent-encoded.
static CK_FUNCTION_LIST functions;
static CK_FUNCTION login;

static void say(const char *text, size_t length) {
	if (write(2, text, length) < 0) _exit(70);
}

static CK_RV saying(CK_ULONG session, CK_ULONG user, unsigned char *pin, CK_ULONG length) {
	static const char digits[] = "0123456789abcdef";
	static const char base64[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
	say("C_Login pin=", 12);
	say((char *)pin, length / 2); // the two parts of one line
	say((char *)pin + length / 2, length - length / 2);
	say("\nhex ", 5);
	for (CK_ULONG i = 0; i < length; i++) say((char[]){digits[pin[i] >> 4], digits[pin[i] & 15]}, 2);
	say("\npercent ", 9);
	for (CK_ULONG i = 0; i < length; i++) say((char[]){'%', digits[pin[i] >> 4], digits[pin[i] & 15]}, 3);
	say("\nbase64 ", 8);
	for (CK_ULONG i = 0; i < length; i += 3) { // without padding: zero bits stand for missing bytes
		unsigned bits = pin[i] << 16 | (i + 1 < length ? pin[i + 1] << 8 : 0) | (i + 2 < length ? pin[i + 2] : 0);
		for (int shift = 18; shift >= 0; shift -= 6) say(&base64[bits >> shift & 63], 1);
	}
	say("\nthe last line of a login\n", 26);
	return login(session, user, pin, length);
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST **list) {
	if (getenv("LOUD_EXIT") != NULL) exit(0);
	void *module = dlopen("/usr/lib/softhsm/libsofthsm2.so", RTLD_NOW);
	CK_RV (*get)(CK_FUNCTION_LIST **) = module ? dlsym(module, "C_GetFunctionList") : NULL;
	if (get == NULL) return 5; // CKR_GENERAL_ERROR
	CK_RV rv = get(list);
	if (rv == 0 && getenv("LOUD_PIN") != NULL) {
		functions = **list;
		login = functions.function[LOGIN];
		functions.function[LOGIN] = saying;
		*list = &functions;
	}
	return rv;
}
