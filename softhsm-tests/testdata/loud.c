// The loud module forwards to SoftHSM, and misbehaves as a library in its process:
//
//   LOUD_EXIT     if set, the process ends with exit status 0 at C_GetFunctionList
//   LOUD_REFUSES  a variable's name: if the variable is set, the process ends with exit status 1
//
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

CK_RV C_GetFunctionList(CK_FUNCTION_LIST **list) {
	if (getenv("LOUD_EXIT") != NULL) exit(0);
	void *module = dlopen("/usr/lib/softhsm/libsofthsm2.so", RTLD_NOW);
	CK_RV (*get)(CK_FUNCTION_LIST **) = module ? dlsym(module, "C_GetFunctionList") : NULL;
	return get ? get(list) : 5; // CKR_GENERAL_ERROR
}
